"""evit-fast classify: the same answers as the eager model, and what happens to what is broken."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from randomize import randomize

import evit_fast
from evit_fast import container, imagenet, images


def eager_probabilities(model, path) -> torch.Tensor:
    p = images.DEFAULT
    x = torch.from_numpy(images.load(path).copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return model(images.normalise(x, p.mean, p.std))[0].softmax(0)


def assert_answers(report: dict, model, names=None) -> None:
    for image in report["images"]:
        want = eager_probabilities(model, image["path"])
        top = want.topk(len(image["classes"]))
        assert [c["class"] for c in image["classes"]] == top.indices.tolist()
        for c in image["classes"]:
            assert c["probability"] == pytest.approx(want[c["class"]].item(), abs=2e-4)
            assert c["name"] == (names[c["class"]] if names else None)


def test_a_folder_as_json(evit, eager, checkpoint, pictures):
    code, out, err = evit(
        "classify", pictures, "--checkpoint", checkpoint, "--json", "--top", 3, "--batch", 4
    )
    assert code == 0 and err == ""
    report = json.loads(out)
    assert report["model"] == "efficientvit_m0" and report["failed"] == []
    names = [i["path"][len(str(pictures)) + 1 :] for i in report["images"]]
    assert names == ["a.png", "b.jpg", "c.webp", "d.png"] + [f"more/{n}" for n in (
        "e.png", "f.JPEG", "g.png")]  # fmt: skip
    assert all(len(i["classes"]) == 3 for i in report["images"])
    assert_answers(report, eager, imagenet.class_names())


def test_text_has_names_and_percent(evit, eager, checkpoint, pictures):
    path = pictures / "a.png"
    code, out, _ = evit("classify", path, "--checkpoint", checkpoint, "--model", "m0", "--top", 1)
    probability, c = eager_probabilities(eager, path).max(0)
    first, second = out.splitlines()
    assert code == 0 and first == str(path)
    shown, name = second.split(maxsplit=1)
    assert float(shown.rstrip("%")) == pytest.approx(100 * probability.item(), abs=0.02)
    assert name == imagenet.class_names()[c]


def test_a_broken_image_is_reported_and_the_rest_goes_on(evit, checkpoint, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    missing = tmp_path / "missing.png"
    code, out, err = evit(
        "classify", tmp_path / "broken.png", missing, pictures / "a.png", "--checkpoint",
        checkpoint, "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 1
    assert [i["path"] for i in report["images"]] == [str(pictures / "a.png")]
    assert {f["path"] for f in report["failed"]} == {str(tmp_path / "broken.png"), str(missing)}
    assert f"{tmp_path / 'broken.png'}: it cannot be decoded" in err
    assert f"{missing}: no such file" in err


def test_large_images_only_when_asked_for(evit, checkpoint, tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (6000, 5000)).save(path, compress_level=1)
    code, out, err = evit("classify", path, "--checkpoint", checkpoint)
    assert code == 1 and out == "" and "30.0 megapixels" in err and "--large" in err
    code, out, err = evit("classify", path, "--checkpoint", checkpoint, "--large")
    assert code == 0 and str(path) in out


def test_a_saved_model_brings_its_own_everything(evit, pictures, tmp_path):
    model = randomize(evit_fast.create_model("m0", num_classes=4), seed=5).eval()
    evit_fast.save(evit_fast.accelerate(model), tmp_path / "four.evit")
    code, out, _ = evit("classify", pictures, "--checkpoint", tmp_path / "four.evit", "--json")
    report = json.loads(out)
    assert code == 0 and report["model"] == "efficientvit_m0"
    assert all(len(i["classes"]) == 4 for i in report["images"])
    assert_answers(report, model)


def test_class_names_come_from_the_file(evit, pictures, tmp_path):
    model = randomize(evit_fast.create_model("m0", num_classes=4), seed=5).eval()
    names = ["ant", "bee", "cat", "dog"]
    evit_fast.save(evit_fast.accelerate(model), tmp_path / "named.evit", classes=names)
    image = pictures / "a.png"
    code, out, _ = evit("classify", image, "--checkpoint", tmp_path / "named.evit", "--json")
    assert code == 0
    assert_answers(json.loads(out), model, names)
    program, blob, metadata = container.read(tmp_path / "named.evit")
    container.write(tmp_path / "few.evit", program, blob, {**metadata, "classes": '["ant"]'})
    code, _, err = evit("classify", image, "--checkpoint", tmp_path / "few.evit")
    assert code == 2 and "names 1 classes, its model has 4" in err


def test_out_file(evit, checkpoint, pictures, tmp_path):
    common = ("classify", pictures / "more", "--checkpoint", checkpoint, "--top", 2)
    assert evit(*common, "--out", tmp_path / "r.json")[0] == 0
    assert evit(*common, "--out", tmp_path / "r.csv")[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    with open(tmp_path / "r.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["path"], int(r["class"])) for r in rows] == [
        (i["path"], c["class"]) for i in report["images"] for c in i["classes"]
    ]
    assert len(rows) == 6 and [r["rank"] for r in rows[:2]] == ["1", "2"]
    code, _, err = evit(*common, "--out", tmp_path / "r.txt")
    assert code == 2 and "ends in .json or .csv" in err


def test_threads_and_batch_change_nothing(evit, checkpoint, pictures):
    common = ("classify", pictures, "--checkpoint", checkpoint, "--json")
    answers = [
        evit(*common, "--batch", batch, "--threads", threads)[1]
        for batch, threads in ((1, 1), (16, 1), (3, 2))
    ]
    assert answers[0] == answers[1] == answers[2]


def damaged(name: str, folder) -> str:
    path = folder / name
    if name == "text.pth":
        path.write_text("no weights")
    elif name == "cut.evit":
        path.write_bytes(b"\x10" + bytes(20))
    elif name == "other.pth":
        torch.save({"stem.weight": torch.zeros(3, 3)}, path)
    return str(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give --checkpoint FILE, or --model"),
        (("--model", "b0"), "unknown model 'b0'"),
        (("--checkpoint", "missing.pth"), "missing.pth: no such file"),
        (("--checkpoint", "text.pth"), "text.pth"),
        (("--checkpoint", "cut.evit"), "cut.evit"),
        (("--checkpoint", "other.pth"), "other.pth"),
        (("--device", "abacus", "--model", "m0"), "abacus"),
        (("--batch", "0", "--model", "m0"), "at least 1"),
        (("--top", "0", "--model", "m0"), "at least 1"),
        (("--dtype", "int3", "--model", "m0"), "invalid choice"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_use_is_one_sentence_and_exit_2(evit, pictures, tmp_path, arguments, message):
    arguments = [damaged(a, tmp_path) if "." in a else a for a in arguments]
    code, out, err = evit("classify", pictures / "a.png", *arguments)
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err
    assert len(err.splitlines()) == 1 or err.startswith("usage:")


def test_files_that_cannot_classify(evit, eager, pictures, tmp_path):
    """One channel, no classifier, a flipped bit, the wrong model or flag: never a traceback."""

    def refused(name: str, message: str, *arguments: str) -> None:
        code, out, err = evit("classify", pictures, "--checkpoint", tmp_path / name, *arguments)
        assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1

    grey = randomize(evit_fast.create_model("m0", num_classes=7, in_chans=1))
    evit_fast.save(evit_fast.accelerate(grey), tmp_path / "grey.evit")
    refused("grey.evit", "images have 3 channels, the model takes 1")
    features = randomize(evit_fast.create_model("m0", num_classes=0))
    evit_fast.save(evit_fast.accelerate(features), tmp_path / "features.evit")
    torch.save(features.state_dict(), tmp_path / "features.pth")
    refused("features.evit", "has no classifier")
    refused("features.pth", "has no classifier")
    assert evit("explain", "--checkpoint", tmp_path / "features.evit")[0] == 0
    assert evit("explain", "--checkpoint", tmp_path / "features.pth")[0] == 0
    data = bytearray((tmp_path / "features.evit").read_bytes())
    data[-1] ^= 1
    (tmp_path / "flipped.evit").write_bytes(data)
    refused("flipped.evit", "crc32")
    evit_fast.save(evit_fast.accelerate(eager), tmp_path / "m0.evit")
    refused("m0.evit", "holds efficientvit_m0, but --model says m1", "--model", "m1")
    refused("m0.evit", "--dtype", "--dtype", "bfloat16")
    assert evit("classify", pictures, "--checkpoint", tmp_path / "m0.evit", "--model", "M0")[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(evit, checkpoint, pictures):
    code, out, err = evit("classify", pictures, "--checkpoint", checkpoint, "--device", "cuda")
    assert code == 2 and out == "" and "CUDA" in err and len(err.splitlines()) == 1


def test_the_wrong_model_for_a_file(evit, checkpoint, pictures):
    code, _, err = evit("classify", pictures, "--checkpoint", checkpoint, "--model", "m1")
    assert code == 2 and "efficientvit_m0" in err and len(err.splitlines()) == 1


def test_pretrained_weights_offline(evit, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIT_FAST_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = evit("classify", pictures / "a.png", "--model", "m0")
    assert code == 2 and "timm/efficientvit_m0.r224_in1k" in err and len(err.splitlines()) == 1


def test_as_a_process(checkpoint, pictures):
    run = subprocess.run(
        [sys.executable, "-m", "evit_fast", "classify", str(pictures / "a.png"), "--checkpoint",
         checkpoint],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 6 and run.stderr == ""
