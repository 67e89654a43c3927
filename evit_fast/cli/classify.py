"""Names what is on images: files, folders (searched recursively) and patterns; JPEG, PNG, WebP.

A broken image is reported and the rest goes on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import TextIO

from evit_fast.cli.flags import UsageError, add_flags, at_least_one
from evit_fast.cli.loading import load_classifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="file, folder or pattern")
    parser.add_argument(
        "--top", type=at_least_one, default=5, metavar="K", help="classes per image (5)"
    )
    parser.add_argument(
        "--large", action="store_true", help="take images of more than 25 megapixels too"
    )
    add_flags(
        parser, "--model", "--checkpoint", "--dtype", "--batch", "--threads", "--device", "--json",
        "--out",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.out and Path(args.out).suffix not in (".json", ".csv"):
        raise UsageError(f"--out {args.out}: expected a name that ends in .json or .csv")
    from PIL import Image
    from tqdm import tqdm

    from evit_fast import batch, images

    # Image sizes are checked in images.decode, before a pixel is read; PIL's own limit would only
    # add a warning.
    Image.MAX_IMAGE_PIXELS = None
    loaded = load_classifier(args)
    paths, failures = batch.find_images(args.paths)
    for failure in failures:
        _report(failure)

    results: list[dict] = []
    batches = batch.load_batches(
        paths, loaded.preprocessing, args.batch, None if args.large else images.MAX_PIXELS
    )
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=len(paths), unit="image", file=sys.stderr, disable=None) as bar:
        for b in batches:
            if b.failures:
                failures += b.failures
                with bar.external_write_mode(file=sys.stderr):
                    for failure in b.failures:
                        _report(failure)
            if b.pixels is not None:
                new = _classify(loaded, b, args)
                results += new
                if not args.json:
                    with bar.external_write_mode(file=sys.stdout):
                        print("\n".join(_as_text(r) for r in new), flush=True)
            bar.update(len(b.paths) + len(b.failures))

    report = {
        "model": loaded.name,
        "images": results,
        "failed": [{"path": f.path, "error": f.reason} for f in failures],
    }
    if args.json:
        print(json.dumps(report, indent=2))
    if args.out:
        with open(args.out, "w", newline="", encoding="utf-8") as f:
            _write_csv(f, results) if args.out.endswith(".csv") else json.dump(report, f, indent=2)
    return 1 if failures else 0


def _classify(loaded, b, args: argparse.Namespace) -> list[dict]:
    """One dict per image: its path and its `top` classes, most likely first."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(b.pixels.to(args.device))
    probabilities = logits.float().softmax(1).cpu()
    top = probabilities.topk(min(args.top, probabilities.shape[1]), dim=1)
    return [
        {
            "path": path,
            "classes": [
                {
                    "class": c,
                    "name": loaded.classes[c] if loaded.classes else None,
                    "probability": round(p, 6),
                }
                for p, c in zip(values, indices, strict=True)
            ],
        }
        for path, values, indices in zip(
            b.paths, top.values.tolist(), top.indices.tolist(), strict=True
        )
    ]


def _as_text(result: dict) -> str:
    lines = [result["path"]]
    for c in result["classes"]:
        lines.append(f"  {c['probability']:7.2%}  {c['name'] or 'class ' + str(c['class'])}")
    return "\n".join(lines)


def _write_csv(f: TextIO, results: list[dict]) -> None:
    writer = csv.writer(f)
    writer.writerow(["path", "rank", "class", "name", "probability"])
    for r in results:
        for rank, c in enumerate(r["classes"], 1):
            writer.writerow([r["path"], rank, c["class"], c["name"], c["probability"]])


def _report(failure) -> None:
    print(f"{failure.path}: {failure.reason}", file=sys.stderr)
