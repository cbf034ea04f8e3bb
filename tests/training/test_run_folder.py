import pytest

from longtake.training import RunFolder, environment, find_checkpoint


def test_folder_is_set_aside_under_the_next_free_name(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.set_aside()  # nothing there
    for number in (1, 2):
        folder.write_config(f"number: {number}\n")
        folder.set_aside()
        assert (tmp_path / f"run.old-{number}/config.yaml").read_text() == f"number: {number}\n"
    assert not folder.path.exists()


def test_record_is_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_record({"name": "größer", "steps_done": 0})
    folder.write_record({"name": "größer", "steps_done": 5})
    assert folder.read_record() == {"name": "größer", "steps_done": 5}
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


def test_environment_names_versions_and_device():
    values = environment()
    assert {"longtake", "torch", "av"} <= values["packages"].keys()
    assert values["device"]["type"] in ("cpu", "cuda")


def test_folder_without_checkpoints_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint: expected a run's folder"):
        find_checkpoint(tmp_path)
    assert not RunFolder(tmp_path).has_checkpoints()
