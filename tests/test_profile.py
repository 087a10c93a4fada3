"""Profile files: round trip, and one clear line for whatever is wrong with one."""

import json

import pytest

from ddg_sim.profile import LinkProfile, Profile, ProfileError, StageProfile, read


def profile():
    stages = [
        StageProfile(
            layers=[f"fc{k}"],
            forward=0.1 + k,
            backward=0.2 + k,
            update=0.01,
            recompute=0.11,
            overhead=0.001,
            output_bytes=400,
            parameter_bytes=4000,
        )
        for k in range(2)
    ]
    return Profile(
        version=1,
        model="mlp",
        data="digits",
        batch_size=32,
        device="cpu",
        threads=1,
        torch="2.11.0",
        cuts=[3],
        stages=stages,
        links=[LinkProfile(activation=0.5, gradient=0.6, bytes=400)],
    )


def test_round_trip_and_costs(tmp_path):
    path = tmp_path / "profile.json"
    profile().write(path)
    assert read(path) == profile()
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]  # no temporary is left
    found = read(path).costs()
    assert found.forward == (0.1, 1.1)
    assert found.backward == (0.2, 1.2)
    assert found.update == (0.01, 0.01)
    assert found.recompute == (0.11, 0.11)
    assert found.activation_transfer == (0.5,)
    assert found.gradient_transfer == (0.6,)
    assert found.overhead == (0.001, 0.001)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    profile().write(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        profile().write(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def change(**changes):
    def edit(data):
        data.update(changes)

    return edit


def stage(**changes):
    def edit(data):
        data["stages"][1].update(changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(version=2), r"version: input should be 1 \(got 2\)"),
        (change(colour="red"), r"colour: extra inputs are not permitted \(got 'red'\)"),
        (change(batch_size=0), r"batch_size: input should be greater than or equal to 1 \(got 0\)"),
        (change(batch_size="8"), "batch_size: input should be a valid integer"),
        (change(stages=[]), "stages: list should have at least 1 item"),
        (change(links=[]), "links must have 1 entries for 2 stages, got 0"),
        (change(cuts=[]), "cuts must have 1 entries for 2 stages, got 0"),
        (change(cuts=[0]), r"cuts\[0\]: input should be greater than or equal to 1"),
        (lambda data: data.pop("model"), "model: field required"),
        (stage(forward=-1.0), r"stages\[1\].forward: input should be greater than or equal to 0"),
        (stage(forward=float("nan")), r"stages\[1\].forward: input should be a finite number"),
        (stage(update=None), r"stages\[1\].update: input should be a valid number \(got None\)"),
        (stage(output_bytes=1.5), r"stages\[1\].output_bytes: input should be a valid integer"),
    ],
)
def test_one_clear_line_names_path_and_field(tmp_path, edit, message):
    path = tmp_path / "bad.json"
    data = json.loads(profile().model_dump_json())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_cuts_increase(tmp_path):
    data = json.loads(profile().model_dump_json())
    data["stages"].append(data["stages"][1])
    data["links"].append(data["links"][0])
    data["cuts"] = [3, 3]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=r"cuts must increase, got \[3, 3\]"):
        read(path)


def test_files_that_are_no_profile(tmp_path):
    with pytest.raises(ProfileError, match=r"nowhere.json: cannot be read: No such file"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        read(tmp_path)
    path = tmp_path / "broken.json"
    path.write_text('{"version": 1,')
    with pytest.raises(ProfileError, match="broken.json: not valid JSON: EOF"):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not a text file"):
        read(path)
    path.write_text("[]")
    with pytest.raises(ProfileError, match="broken.json: input should be an object"):
        read(path)
