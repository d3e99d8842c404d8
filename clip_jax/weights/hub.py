"""The Hugging Face hub: files of a repository, fetched once and kept in the client's cache."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from clip_jax.errors import WeightsError
from clip_jax.version import __version__
from clip_jax.weights import open_clip, transformers

PREFIX = "hf:"
# Where OpenAI's weights lie as safetensors, all nine in the same form (OpenCLIP's).
OPENAI = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}
# A form by its config, and the weights that may go with it, the best first.
FORMS = {
    open_clip.CONFIG: (open_clip.WEIGHTS, "open_clip_pytorch_model.bin"),
    transformers.CONFIG: (transformers.WEIGHTS, transformers.INDEX, "pytorch_model.bin"),
}
BESIDE = {
    open_clip.CONFIG: (),
    transformers.CONFIG: (transformers.PREPROCESSOR, transformers.PROCESSOR),
}
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")


def fetch(name: str, optional: Sequence[str] = ()) -> Path:
    """Fetches what `load` needs of a repository, unless it is in the cache.

    Args:
        name: owner/name, or owner/name@revision (a branch, a tag or a commit).
        optional: further files, where the repository has them.

    Returns:
        The folder in the cache that holds the files.

    Raises:
        WeightsError: no such repository or revision, none of the known forms in it, a download that
            broke off, or no network and nothing in the cache.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise WeightsError(f"{PREFIX}{name}: expected {PREFIX}owner/name or {PREFIX}owner/name@rev")
    repository = _Repository(match["repository"], match["revision"])
    for config, candidates in FORMS.items():
        found = repository.file(config)
        if found is None:
            continue
        for candidate in candidates:
            weights = repository.file(candidate)
            if weights is None:
                continue
            if candidate == transformers.INDEX:
                _fetch_shards(repository, weights)
            for extra in (*BESIDE[config], *optional):
                repository.file(extra)
            return found.parent
    forms = "; ".join(f"{config} with {' or '.join(files)}" for config, files in FORMS.items())
    raise WeightsError(f"{repository} holds no CLIP in a known form: expected {forms}")


class _Repository:
    """The files of a repository: of the hub, or, once that could not be reached, of the cache.

    The client tries for half a minute before it gives the hub up, so that is left to it only once.
    """

    def __init__(self, name: str, revision: str | None):
        self.name, self.revision = name, revision
        self.reachable = True

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")

    def file(self, filename: str) -> Path | None:
        """One file in the cache, or None where the repository does not have it."""
        import huggingface_hub as hub
        from huggingface_hub import errors

        try:
            path = hub.hf_hub_download(
                self.name,
                filename,
                revision=self.revision,
                local_files_only=not self.reachable,
                library_name="clip_jax",
                library_version=__version__,
            )
        except errors.LocalEntryNotFoundError as error:
            self.reachable = False
            cached = hub.try_to_load_from_cache(self.name, filename, revision=self.revision)
            if cached is hub.file_download._CACHED_NO_EXIST:
                return None
            raise WeightsError(
                f"{self}: {filename} is not in the cache, and the hub cannot be reached: check the "
                "network, HF_ENDPOINT and HF_HUB_OFFLINE, or give the path of a local copy"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise WeightsError(
                f"{self} is gated: accept its terms on its page, then `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise WeightsError(f"{self}: the repository has no such revision") from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise WeightsError(
                f"{self}: no such repository on the hub; or it is private, and then `hf auth login`"
            ) from error
        except (
            Exception
        ) as error:  # whatever the client's transport raises, in this version or the next
            raise WeightsError(
                f"{self}: the download of {filename} failed ({_first_line(error)}); the same "
                "command tries again, and goes on where it stopped"
            ) from error
        logging.info("%s: %s", self, path)
        return Path(path)


def _fetch_shards(repository: _Repository, index: Path) -> None:
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        if repository.file(shard) is None:
            raise WeightsError(f"{repository} lists {shard}, but does not hold it")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
