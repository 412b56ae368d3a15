from __future__ import annotations

import pytest
from process_pool import run_ranks

from pivotune.errors import UsageError
from pivotune.training.distributed import ranks


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Results, mistakes and failures of one process reach the other; folders are whole or not there."""
    texts = run_ranks(tmp_path, program="together:main", arguments=[str(tmp_path)])
    assert all("all as promised" in text for text in texts)


def test_one_process_does_everything_itself(tmp_path):
    assert ranks.on_main(lambda: 3) == 3
    assert ranks.gather_objects("x") == ["x"]
    assert ranks.share_out("abc", "-") == ["a", "b", "c"]
    with pytest.raises(KeyError):
        ranks.agree(lambda: {}["missing"])
    with pytest.raises(UsageError, match="wrong"):
        ranks.on_main(_wrong)
    ranks.save_together(tmp_path / "folder", lambda staging: (staging / "file").write_text("new"))
    assert (tmp_path / "folder" / "file").read_text() == "new"


def _wrong() -> None:
    raise UsageError("wrong")
