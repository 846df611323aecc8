import numpy as np
import pytest
from scipy import sparse

from hespotex.data.counts import check_counts, check_names, library_size
from hespotex.errors import CountsError

GOOD = np.array([[0, 2, 1], [3, 0, 0]])
FORMS = [np.asarray, sparse.csr_array, sparse.csr_matrix, sparse.csc_matrix]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.float32, np.float64])
def test_raw_counts_pass_and_stay_as_they_are(form, dtype):
    counts = form(GOOD.astype(dtype))
    check_counts(counts)
    check_counts(form(np.zeros((0, 3), dtype)))
    dense = counts.toarray() if sparse.issparse(counts) else counts
    np.testing.assert_array_equal(dense, GOOD)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("value", "message"),
    [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "NaN or infinite"), (0.69, "already normalised")],
)
def test_what_is_not_a_count_is_named_with_its_remedy(form, value, message):
    wrong = GOOD.astype(np.float64)
    wrong[1, 0] = value
    with pytest.raises(CountsError, match=message) as caught:
        check_counts(form(wrong), "section 'A'")
    assert "section 'A'" in str(caught.value)
    assert "layer" in str(caught.value) or "left out" in str(caught.value)


def test_text_is_no_count():
    with pytest.raises(CountsError, match="numbers"):
        check_counts(GOOD.astype(str))
    with pytest.raises(CountsError, match="dimensions"):
        check_counts(GOOD[0])


def test_duplicate_names_are_listed():
    check_names(["A", "B"])
    with pytest.raises(CountsError, match=r"gene names: 1 occur more than once \(A\)"):
        check_names(["A", "B", "A"])


@pytest.mark.parametrize("form", FORMS)
def test_library_size_does_not_overflow_a_small_dtype(form):
    np.testing.assert_array_equal(library_size(form(np.full((2, 4), 200, dtype=np.uint8))), [800, 800])
