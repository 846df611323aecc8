from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("side", "middle"), [(4, slice(1, 3)), (5, slice(1, 4)), (2, slice(0, 2)), (3, slice(0, 3))])
@pytest.mark.parametrize("n_prefix", [1, 5])
def test_tokens_are_pooled_without_registers(side, middle, n_prefix):
    from hespotex.encoders._pooling import pool

    grid = torch.randn(2, side, side, 3)
    prefix = torch.randn(2, n_prefix, 3)
    tokens = torch.cat([prefix, grid.flatten(1, 2)], 1)
    class_token, mean, centre = prefix[:, 0], grid.mean((1, 2)), grid[:, middle, middle].mean((1, 2))
    expected = {
        "class": class_token,
        "mean": mean,
        "class+mean": torch.cat([class_token, mean], 1),
        "class+centre": torch.cat([class_token, centre], 1),
    }
    for how, values in expected.items():
        np.testing.assert_allclose(pool(tokens, n_prefix, how).numpy(), values.numpy(), atol=1e-6)


def test_a_network_that_normalises_after_pooling_does_so_whatever_is_pooled():
    timm = pytest.importorskip("timm")
    from hespotex.encoders._pooling import Pooled

    for architecture in ("eva02_tiny_patch14_224", "beit_base_patch16_224"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(architecture, num_classes=0, depth=1).eval()
            torch.nn.init.normal_(model.fc_norm.weight)
            images = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            own, mean, both = (Pooled(model, how, "x")(images) for how in (None, "mean", "class+mean"))
            class_token = model.fc_norm(model.forward_features(images)[:, 0])
        np.testing.assert_allclose(mean, own, atol=1e-5)  # both pool by the mean of the patches
        np.testing.assert_allclose(both, torch.cat([class_token, own], 1), atol=1e-5)


def test_a_class_token_that_is_given_apart_is_no_patch():
    timm = pytest.importorskip("timm")
    from hespotex.encoders._pooling import Pooled
    from hespotex.errors import DataValueError

    model = timm.create_model("pit_ti_224", num_classes=0).eval()
    for how in ("class", "mean"):
        with pytest.raises(DataValueError, match="no vision transformer with a class token before its patches"):
            Pooled(model, how, "timm:pit_ti_224")
    with pytest.raises(DataValueError, match="no square of patches"), torch.no_grad():
        Pooled(model, None, "timm:pit_ti_224").patches(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    "architecture",
    [
        *("mobilenetv3_small_050", "mobilenetv4_conv_small", "vgg11", "lcnet_050", "ghostnet_100", "efficientvit_b0"),
        *("hgnet_tiny", "convnext_atto", "regnetx_002", "swin_tiny_patch4_window7_224", "resnet18", "efficientnet_b0"),
        *("deit_tiny_distilled_patch16_224", "levit_128s", "mixer_s32_224", "densenet121", "eva02_tiny_patch14_224"),
    ],
)
def test_the_width_of_features_is_what_comes_out(architecture):
    timm = pytest.importorskip("timm")
    from hespotex.encoders._pooling import Pooled

    with torch.device("meta"), torch.no_grad():
        module = Pooled(timm.create_model(architecture, num_classes=0), None, "x").eval()
        assert module(torch.zeros(1, 3, 224, 224)).shape == (1, module.n_features)
