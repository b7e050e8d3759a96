from conftest import quick


def test_a_run_trains_and_says_where(align, tiny_llama, pairs_file):
    result = align(*quick(tiny_llama, pairs_file))
    assert result.status == 0, result.err
    assert "held-out accuracy" in result.out
    again = align(*quick(tiny_llama, pairs_file))
    assert "complete" in again.out


def test_unknown_key(align):
    result = align("objective.btea=1")
    assert result.status == 1 and "objective.btea" in result.err, result.err
