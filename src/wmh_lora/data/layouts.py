"""Which file is which in a folder of labelled scans, told from the paths alone.

Each layout is a function from paths to `Listing`; no file is opened here. Paths are relative to the
folder, as `wmh_lora.data.catalog` lists them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.layouts import OTHER_OBSERVERS
from wmh_lora.files import image_suffix

__all__ = ["STRUCTURES", "Found", "Listing", "list_bids", "list_challenge", "list_flat"]

#: Structures beside lesions whose masks BIDS folders may hold, as ``label-<structure>``.
STRUCTURES = frozenset({"ventricles", "brain"})


@dataclass(frozen=True)
class Found:
    """The files of one scan.

    Attributes
    ----------
    subject, session, run, site : str
        Whose scan it is; empty where the paths do not tell. `run` is whatever tells several scans
        of one session apart.
    image : PurePosixPath
        The FLAIR.
    masks : tuple of PurePosixPath
        What may be its reference mask: none is a missing mask, several are one too many.
    t1 : PurePosixPath or None
        The T1-weighted scan of the same session.
    structures : mapping of str to PurePosixPath
        Masks of `STRUCTURES`, in BIDS.
    """

    subject: str
    session: str
    run: str
    site: str
    image: PurePosixPath
    masks: tuple[PurePosixPath, ...]
    t1: PurePosixPath | None
    structures: Mapping[str, PurePosixPath] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """Scans of a folder, and masks that belong to none of them."""

    scans: tuple[Found, ...]
    unmatched_masks: tuple[PurePosixPath, ...]


def _stem(path: PurePosixPath) -> str:
    return path.name[: -len(image_suffix(path) or "")]


def _label(parts: Sequence[str]) -> str:
    """Join folder names into one that no file system and no table minds."""
    return "-".join(re.sub(r"[^\w.+-]+", "_", part).strip("._") for part in parts)


# --- WMH Segmentation Challenge ---------------------------------------------------------------

_PUBLISHED_PARTS = ("training", "test", "public")


def list_challenge(paths: Sequence[PurePosixPath], root_name: str) -> Listing:
    """List ``[training|test/]site/[scanner/]subject/`` folders as the challenge publishes them.

    A subject's folder holds ``wmh.nii.gz`` and ``pre/`` (bias-field corrected) or ``orig/`` with
    ``FLAIR.nii.gz`` and ``T1.nii.gz``; ``pre/`` is taken where there are both. The further
    observers of ``additional_annotations/`` are left out.

    Parameters
    ----------
    paths : sequence of PurePosixPath
        Images below the folder.
    root_name : str
        The folder's own name, for what it holds when it is itself a site or a subject.
    """
    images: dict[PurePosixPath, dict[str, PurePosixPath]] = defaultdict(dict)
    masks: dict[PurePosixPath, PurePosixPath] = {}
    for path in paths:
        if OTHER_OBSERVERS in path.parts:
            continue
        stem, folder = _stem(path).lower(), path.parent
        if stem == "wmh":
            masks[folder] = path
        elif stem in ("flair", "t1"):
            step = folder.name.lower()
            if step in ("pre", "orig"):
                images[folder.parent][f"{step}/{stem}"] = path
            else:
                images[folder][f"/{stem}"] = path
    scans = []
    for folder in sorted(images):
        files = images[folder]
        steps = [step for step in ("pre", "orig", "") if f"{step}/flair" in files]
        if not steps:
            continue
        mask = masks.pop(folder, None)
        parts = _from_published_part(folder.parts) or (root_name,)
        places = [part for part in parts[:-1] if part.lower() not in _PUBLISHED_PARTS]
        scans.append(
            Found(
                subject=_label(parts),
                session="",
                run="",
                site=_label(places or [root_name]),
                image=files[f"{steps[0]}/flair"],
                masks=() if mask is None else (mask,),
                t1=files.get(f"{steps[0]}/t1"),
            )
        )
    return Listing(tuple(scans), tuple(sorted(masks.values())))


def _from_published_part(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Drop the folders above ``training`` or ``test``: they are how somebody unpacked it."""
    for index, part in enumerate(parts):
        if part.lower() in _PUBLISHED_PARTS:
            return parts[index:]
    return parts


# --- BIDS -------------------------------------------------------------------------------------

_WMH_LABELS = frozenset({"wmh", "wml", "lesion", "lesions"})
# Entities that say how a file was made or stored, not of which scan.
_NOT_OF_THE_SCAN = frozenset({"sub", "ses", "space", "label", "desc", "res", "den", "part"})


@dataclass(frozen=True)
class _Bids:
    """What the path of a BIDS file tells."""

    path: PurePosixPath
    dataset: tuple[str, ...]
    pipeline: str  # folder in derivatives; empty for raw data
    subject: str
    session: str
    suffix: str
    entities: Mapping[str, str] = field(compare=False)

    @property
    def place(self) -> tuple[tuple[str, ...], str, str]:
        return self.dataset, self.subject, self.session

    @property
    def rest(self) -> dict[str, str]:
        """Entities that tell scans of one session apart."""
        return {k: v for k, v in self.entities.items() if k not in _NOT_OF_THE_SCAN}


def list_bids(
    paths: Sequence[PurePosixPath],
    root_name: str,
    *,
    derivatives: str | None = None,
    sites: Mapping[tuple[str, str], str] | None = None,
) -> Listing:
    """List the ``*_FLAIR`` of one BIDS data set, or of several in folders beside each other.

    Masks are files of ``derivatives/<pipeline>/`` whose name ends in ``mask`` and has
    ``label-WMH`` or the word lesion; ``label-WMH`` is preferred.

    Parameters
    ----------
    paths : sequence of PurePosixPath
        Images below the folder.
    root_name : str
        The folder's own name, the site of a data set that does not name sites.
    derivatives : str, optional
        The pipeline whose masks are the reference.
    sites : mapping, optional
        Site by (data set folder, ``sub-<label>``), from ``participants.tsv``.

    Raises
    ------
    ConfigError
        Masks of several pipelines fit one scan.
    """
    files = [read for path in paths if (read := _read_bids(path)) is not None]
    raw = [file for file in files if not file.pipeline]
    flairs = sorted((f for f in raw if f.suffix == "FLAIR"), key=lambda f: f.path)
    masks = [f for f in files if f.pipeline and _is_wmh_mask(f)]
    others = [f for f in files if f.suffix == "mask" and f.entities.get("label") in STRUCTURES]
    if derivatives is not None:
        masks = [mask for mask in masks if mask.pipeline == derivatives]
    scans: list[Found] = []
    used: set[PurePosixPath] = set()
    for flair in flairs:
        beside = [f for f in flairs if f.place == flair.place]
        fitting = _of_scan(flair, masks, alone=len(beside) == 1)
        pipelines = sorted({mask.pipeline for mask in fitting})
        if len(pipelines) > 1:
            raise ConfigError(
                f"{flair.path} has masks of several pipelines ({', '.join(pipelines)}); name the "
                f"one with the reference, for example --derivatives {pipelines[0]}."
            )
        used.update(mask.path for mask in fitting)
        labelled = [mask for mask in fitting if mask.entities.get("label", "").lower() == "wmh"]
        t1s = _of_scan(flair, [f for f in raw if f.suffix == "T1w"], alone=True)
        near = _of_scan(flair, others, alone=len(beside) == 1)
        near.sort(key=_is_native)  # of several masks of a structure, the last counts
        dataset, subject = "/".join(flair.dataset), f"sub-{flair.subject}"
        known = (sites or {}).get((dataset, subject))
        scans.append(
            Found(
                subject=_label([*flair.dataset, subject]),
                session=flair.session,
                run="_".join(f"{key}-{value}" for key, value in flair.rest.items()),
                site=known or _label(flair.dataset or [root_name]),
                image=flair.path,
                masks=tuple(sorted(mask.path for mask in labelled or fitting)),
                t1=min((t1.path for t1 in t1s), default=None),
                structures={f.entities["label"]: f.path for f in near if f.pipeline in pipelines},
            )
        )
    unmatched = sorted(mask.path for mask in masks if mask.path not in used)
    return Listing(tuple(scans), tuple(unmatched))


def _read_bids(path: PurePosixPath) -> _Bids | None:
    *words, suffix = _stem(path).split("_")
    entities = dict(word.split("-", 1) for word in words if "-" in word)
    folders = path.parts[:-1]
    if "sub" not in entities:
        return None
    session = entities.get("ses", "")
    for folder in folders:
        session = session or folder.removeprefix("ses-") * folder.startswith("ses-")
    pipeline = ""
    inside = (i for i, f in enumerate(folders) if _of_subject(f))
    dataset = [*folders[: next(inside, len(folders))]]
    if "derivatives" in folders:
        at = folders.index("derivatives")
        pipeline = next((f for f in folders[at + 1 :] if not _of_subject(f)), "derivatives")
        dataset = [*folders[:at]]
    return _Bids(path, tuple(dataset), pipeline, entities["sub"], session, suffix, entities)


def _of_subject(folder: str) -> bool:
    """Say whether a folder belongs to a subject, and so names neither data set nor pipeline."""
    return folder == "anat" or folder.startswith(("sub-", "ses-"))


def _is_native(file: _Bids) -> bool:
    """Say whether a file is on the grid of the scan that it is of, by its name."""
    return file.entities.get("space", "orig") == "orig"


def _is_wmh_mask(file: _Bids) -> bool:
    if "mask" not in file.suffix.lower():
        return False
    label = file.entities.get("label")
    return label.lower() in _WMH_LABELS if label else "lesion" in file.path.name.lower()


def _of_scan(flair: _Bids, others: Sequence[_Bids], *, alone: bool) -> list[_Bids]:
    """Files of the same session whose other entities agree; all must where scans are several."""
    near = [other for other in others if other.place == flair.place]
    exact = [other for other in near if other.rest == flair.rest]
    if exact or not alone:
        return exact
    return [o for o in near if all(flair.rest.get(k, v) == v for k, v in o.rest.items())]


# --- flat folders -----------------------------------------------------------------------------

_MASK_WORDS = frozenset(
    {"mask", "seg", "segmentation", "wmh", "wml", "lesion", "lesions", "label", "labels", "gt"}
    | {"manual", "roi", "reference"}
)
_FLAIR_WORDS = frozenset({"flair", "t2flair"})
_T1_WORDS = frozenset({"t1", "t1w", "mprage"})
_OTHER_WORDS = frozenset({"t2", "t2w", "pd", "pdw", "dwi", "adc", "swi", "t1c", "t1ce", "probseg"})
_STRUCTURES = frozenset({"brain", "brainmask", "ventricles", "ventricle", "icv", "tissue"})
_WORDS = _MASK_WORDS | _FLAIR_WORDS | _T1_WORDS | _OTHER_WORDS | _STRUCTURES
_DETAIL = re.compile(r"(?:space|label|desc|res|den)-.+")
_DASHED_WORD = re.compile(rf"(.+)-({'|'.join(sorted(_WORDS))})", re.IGNORECASE)
_VISIT = re.compile(r"(?:ses|visit|tp|timepoint)-?(\w+)", re.IGNORECASE)
_IMAGE_FOLDER = re.compile(r"(?:images?|imgs?)(\w*)", re.IGNORECASE)
# Of a split, or numbered: other words, as in labelled or lesion_study, make no folder of masks.
_PART = r"_?(?:tr|ts|va|val|train|training|test|testing|valid|validation|\d+)"
_MASK_FOLDER = re.compile(rf"(?:labels?|masks?|lesions?|annotations?)(|{_PART})", re.IGNORECASE)
_CHANNEL = re.compile(r"\d{4}")


@dataclass(frozen=True)
class _Flat:
    """What the path of a file in a flat folder tells."""

    path: PurePosixPath
    role: str  # flair, t1, mask, plain, or other
    site: tuple[str, ...]
    subject: str
    session: str
    run: str  # what else a BIDS-like name tells: run-2, acq-3D


def list_flat(
    paths: Sequence[PurePosixPath],
    root_name: str,
    *,
    channels: Mapping[str, str] | None = None,
) -> Listing:
    """List pairs that are told by the ends of their names, or by folders ``images``/``labels``.

    ``X_FLAIR`` or ``X`` goes with ``X_mask``, ``X_FLAIR_mask``, ``X_wmh``, ``X_lesion``, ``X_seg``
    and the like; ``X/FLAIR`` with ``X/mask``; ``images/X`` with ``labels/X``, and
    ``imagesTr/X_0000`` with ``labelsTr/X``. Parts of the name such as ``ses-2`` or ``visit2`` are
    sessions; after ``sub-01``, ``run-2`` and ``acq-3D`` tell scans of one person apart. Where any
    file is called FLAIR, other images without a mask are left out.

    Parameters
    ----------
    paths : sequence of PurePosixPath
        Images below the folder.
    root_name : str
        The folder's own name, the site of what lies directly in it.
    channels : mapping, optional
        Role (``flair``, ``t1``) of the channel numbers that end the names in an images folder;
        without it ``0000`` is the FLAIR.
    """
    roles = {"0000": "flair"} if channels is None else channels
    groups: dict[tuple[tuple[str, ...], str, str, str], dict[str, list[PurePosixPath]]] = {}
    for path in sorted(paths):
        file = _read_flat(path, roles)
        key = (file.site, file.subject, file.session, file.run)
        groups.setdefault(key, defaultdict(list))[file.role].append(path)
    named = any(group["flair"] for group in groups.values())
    scans: list[Found] = []
    unmatched: list[PurePosixPath] = []
    for (site, subject, session, run), group in sorted(groups.items()):
        images = group["flair"] or ([] if named and not group["mask"] else group["plain"])
        if not images:
            unmatched += group["mask"]
        scans += [
            Found(
                subject=_label([*site, subject or root_name]),
                session=session,
                run=_stem(image) if len(images) > 1 else run,
                site=_label(site or [root_name]),
                image=image,
                masks=tuple(group["mask"]),
                t1=min(group["t1"], default=None),
            )
            for image in images
        ]
    return Listing(tuple(scans), tuple(sorted(unmatched)))


def _read_flat(path: PurePosixPath, channels: Mapping[str, str]) -> _Flat:
    role, session, places = "", "", []
    for folder in path.parts[:-1]:
        if match := _MASK_FOLDER.fullmatch(folder):
            role = "mask"
        elif match := _IMAGE_FOLDER.fullmatch(folder):
            role = "image"
        elif visit := _VISIT.fullmatch(folder):
            session = visit[1]
            continue
        else:
            places.append(folder)
            continue
        if match[1].lower() not in ("", "tr"):  # images of nnU-Net's training set need no mark
            places.append(match[1])
    tokens = [token for word in _stem(path).split("_") for token in _undashed(word)]
    if role == "image" and len(tokens) > 1 and _CHANNEL.fullmatch(tokens[-1]):
        role = channels.get(tokens.pop(), "other")
    words: set[str] = set()
    while tokens and (tokens[-1].lower() in _WORDS or _DETAIL.fullmatch(tokens[-1])):
        words.add(tokens.pop().lower())
    name = []
    for token in tokens:
        visit = _VISIT.fullmatch(token)
        session, keep = (visit[1], []) if visit else (session, [token])
        name += keep
    run = ""
    if name and name[0].startswith("sub-"):
        run = "_".join(token for token in name[1:] if "-" in token)
        name = [name[0], *(token for token in name[1:] if "-" not in token)]
    subject = "_".join(name)
    if places and subject in ("", places[-1]):  # a folder for each person
        subject = places.pop()
    if role in ("", "image"):
        role = _role(words, "flair" if role == "image" else "plain")
    return _Flat(path, role, tuple(places), subject, session, run)


def _undashed(word: str) -> tuple[str, ...]:
    """Read person-mask as person_mask, but leave label-lesion whole."""
    match = None if _DETAIL.fullmatch(word) else _DASHED_WORD.fullmatch(word)
    return (*_undashed(match[1]), match[2]) if match else (word,)


def _role(words: set[str], default: str) -> str:
    """Say what a file is, from the words that end its name."""
    labels = {word.removeprefix("label-") for word in words if word.startswith("label-")}
    if words & _MASK_WORDS:
        foreign = words & (_STRUCTURES | _T1_WORDS | {"probseg"}) or labels - _WMH_LABELS
        return "other" if foreign else "mask"
    if "probseg" in words:
        return "other"
    if words & _FLAIR_WORDS:
        return "flair"
    if words & _T1_WORDS:
        return "t1"
    return "other" if words & (_OTHER_WORDS | _STRUCTURES) else default
