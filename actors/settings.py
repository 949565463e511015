"""The settings: one frozen value, made from a TOML document and the environment, with every fault found at once.

Each section of the document is a struct below, and each field a key: the name without its unit, so that `memory_bytes` is
`memory = "512Mi"` and `drain_timeout_s` is `drain_timeout = "15s"`.  The units are read by `actors.quantities`; bounds stand at
the field.  `AERIE_<SECTION>_<KEY>` overrides a key, and any other variable that starts with AERIE_ is a fault, since it is
nearly always a mistyped one.

What each setting is for is said in conf/aerie.toml, where a test holds the defaults and bounds against those here.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from actors.quantities import FORMATTERS, PARSERS, QuantityError

CONFIGURATION: Final = Path(__file__).resolve().parent.parent / "conf" / "aerie.toml"
PREFIX: Final = "AERIE_"
CONFIGURATION_VARIABLE: Final = "AERIE_CONFIG"
# sun_path of a Unix socket has 108 bytes; the longest name of ours in the run directory is forkserver.sock.
RUN_DIR_BYTES_MAX: Final = 108 - len("/forkserver.sock") - 1

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
NOUNS: Final = {"bytes": "a size", "cores": "a number of cores", "s": "a duration"}

Directory = Annotated[str, Meta(pattern=r"^/[^\0]*$")]
Runtime = Literal["crun", "runc", "gvisor"]


class SettingsError(Exception):
    """The settings cannot be used: `faults` are all that is wrong, each with its cure."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


# REGISTRY=MIRROR pairs with spaces between; `actors.image.registry.mirrors` says what a mirror is.
Mirrors = Annotated[
    str,
    Meta(
        pattern=r"^ *([^\s=/]+=(https?://)?[^\s=/]+(/[^\s=]*)?( +|$))*$",
        description="REGISTRY=MIRROR pairs with spaces between, or nothing",
    ),
]


class Section(msgspec.Struct, frozen=True):
    pass


class StateSection(Section, frozen=True):
    dir: Directory = "/var/lib/aerie"


class RunSection(Section, frozen=True):
    dir: Directory = "/run/aerie"


class DaemonSection(Section, frozen=True):
    drain_timeout_s: Annotated[float, Meta(ge=0, le=86400)] = 15
    progress_timeout_s: Annotated[float, Meta(ge=1, le=86400)] = 60


class ImageSection(Section, frozen=True):
    # The seed's directories; `parse` puts others in their place when state or run directory are given.
    cache_dir: Directory = "/var/lib/clip/cache"
    archive_dir: Directory = "/var/lib/clip/work"
    mount_dir: Directory = "/var/lib/clip/mnt"
    resolve_interval_s: Annotated[float, Meta(ge=0, le=30 * 86400)] = 60
    mirrors: Mirrors = ""
    prefetch: Literal["off", "trace", "full"] = "off"
    cache_bytes_max: Annotated[int, Meta(ge=MIB, le=1024 * TIB)] = 100 * GIB
    archive_bytes_max: Annotated[int, Meta(ge=MIB, le=1024 * TIB)] = 10 * GIB
    free_bytes_min: Annotated[int, Meta(ge=0, le=1024 * TIB)] = 2 * GIB
    check_interval_s: Annotated[float, Meta(ge=0, le=3650 * 86400)] = 7 * 86400
    spool_bytes_max: Annotated[int, Meta(ge=16 * MIB, le=TIB)] = GIB
    idle_unmount_s: Annotated[float, Meta(ge=0, le=30 * 86400)] = 300
    unpacked_bytes_max: Annotated[int, Meta(ge=MIB, le=16 * TIB)] = 64 * GIB
    entries_max: Annotated[int, Meta(ge=1, le=16_000_000)] = 1_000_000
    build_timeout_s: Annotated[float, Meta(ge=1, le=86400)] = 3600


class S3Section(Section, frozen=True):
    bucket: Annotated[str, Meta(pattern=r"^([A-Za-z0-9._-]{3,255})?$", description="a bucket's name, or nothing")] = ""
    prefix: Annotated[str, Meta(pattern=r"^[!-~]*$", max_length=500, description="a part of a key, or nothing")] = "aerie"
    endpoint: Annotated[str, Meta(pattern=r"^(https?://[^\s/]+/?)?$", description="http(s)://HOST[:PORT], or nothing")] = ""
    region: Annotated[str, Meta(pattern=r"^[A-Za-z0-9-]*$", description="a region's name, or nothing")] = ""


class MountSection(Section, frozen=True):
    read_timeout_s: Annotated[float, Meta(ge=0.1, le=3600)] = 30
    ready_timeout_s: Annotated[float, Meta(ge=1, le=3600)] = 60
    sync_interval_s: Annotated[float, Meta(ge=0, le=86400)] = 5
    entries_max: Annotated[int, Meta(ge=1, le=16_000_000)] = 1_000_000
    # Walks are recursive, a few frames of Python's for each directory.
    depth_max: Annotated[int, Meta(ge=1, le=250)] = 200
    staged_bytes_max: Annotated[int, Meta(ge=MIB, le=1024 * TIB)] = TIB
    small_bytes_max: Annotated[int, Meta(ge=0, le=TIB)] = 256 * MIB


class SandboxSection(Section, frozen=True):
    # No keys: who a task is, and whose its workspace's files are, is the same on every node.
    uid: ClassVar[int] = 1000
    gid: ClassVar[int] = 1000

    runtime: Runtime = "crun"
    memory_bytes: Annotated[int, Meta(ge=6 * MIB, le=64 * TIB)] = 512 * MIB
    cpu_cores: Annotated[float, Meta(ge=0.01, le=4096)] = 1
    pids: Annotated[int, Meta(ge=1, le=4_000_000)] = 1024
    stop_grace_s: Annotated[float, Meta(ge=0, le=3600)] = 10


class OutputSection(Section, frozen=True):
    console: bool = False
    file_dir: Annotated[str, Meta(pattern=r"^(/[^\0]*)?$")] = ""


class GatewaySection(Section, frozen=True):
    parallel: Annotated[int, Meta(ge=1, le=10_000)] = 64
    queue: Annotated[int, Meta(ge=0, le=1_000_000)] = 1024
    connections: Annotated[int, Meta(ge=1, le=10_000)] = 256
    results_keep_s: Annotated[float, Meta(ge=0, le=3650 * 86400)] = 86400
    results_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    logs_bytes_max: Annotated[int, Meta(ge=0, le=1024 * TIB)] = 10 * GIB


class Settings(msgspec.Struct, frozen=True):
    state: StateSection
    run: RunSection
    daemon: DaemonSection
    image: ImageSection
    s3: S3Section
    mount: MountSection
    sandbox: SandboxSection
    output: OutputSection
    gateway: GatewaySection

    def directories(self) -> dict[str, str]:
        """Every directory, by the variable that sets it: an environment for processes that must agree on them."""
        return {
            variable: getattr(getattr(self, section), key)  # a path has no unit: its key is its field
            for variable, (section, key) in VARIABLES.items()
            if section in ("state", "run", "image") and key.endswith("dir")
        }


SECTIONS: Final[dict[str, type[Section]]] = get_type_hints(Settings)


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this machine: conf/aerie.toml, or the file that AERIE_CONFIG names, and the environment.

    Raises SettingsError.
    """
    path = Path(environment.get(CONFIGURATION_VARIABLE) or CONFIGURATION)
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise SettingsError([f"{path}: {error.strerror}: {CONFIGURATION_VARIABLE} must name a file that can be read"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: not TOML: {error}"]) from None
    # Without symbolic links, as mountinfo shows what is mounted in them: /var/run is one nearly everywhere.
    return parse(document, environment, str(path), os.path.realpath)


def parse(
    document: Mapping[str, Any],
    environment: Mapping[str, str],
    source: str = "the file",
    resolved: Callable[[str], str] = os.path.normpath,
) -> Settings:
    """Settings from a document of sections and from AERIE_* variables, which win.

    `source` names the document in faults.  `resolved` gives each directory the path by which it is known from here on.  Raises
    SettingsError.
    """
    faults: list[str] = []
    given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, key, value, name in _given(document, environment, source, faults):
        field = KEYS[section][key]
        try:
            given[section][field] = _convert(section, field, value)
        except ValueError as error:
            faults.append(f"{name} = {_shown(value)}: {error}")
    _place_directories(given)
    settings = msgspec.convert({section: struct(**given[section]) for section, struct in SECTIONS.items()}, Settings)
    settings = _with_directories(settings, resolved)
    if len(os.fsencode(settings.run.dir)) > RUN_DIR_BYTES_MAX:
        faults.append(
            f"run.dir = {settings.run.dir}: more than {RUN_DIR_BYTES_MAX} bytes: no socket in it could have an address"
        )
    if settings.run.dir == settings.state.dir:
        faults.append(f"run.dir = {settings.run.dir}: the same as state.dir: give each a directory of its own")
    if faults:
        raise SettingsError(faults)
    return settings


def key_of(field: str) -> str:
    """The key of a field: its name without the unit.  `unpacked_bytes_max` → `unpacked_max`."""
    return re.sub(r"_(bytes|cores|s)(?=_max$|_min$|$)", "", field)


def unit_of(field: str) -> str | None:
    """`bytes`, `cores`, `s` (seconds), or None for a number, a word or a path as it stands."""
    matched = re.search(r"_(bytes|cores|s)(?:_max|_min)?$", field)
    return matched[1] if matched else None


KEYS: Final = {
    section: {key_of(field): field for field in struct.__struct_fields__} for section, struct in SECTIONS.items()
}  # section → key → field
VARIABLES: Final = {f"{PREFIX}{section}_{key}".upper(): (section, key) for section, keys in KEYS.items() for key in keys}


def accepted(section: str, field: str) -> str:
    """What a setting may be, for a human: `a size from 1Mi to 16Ti`."""
    hint = get_type_hints(SECTIONS[section], include_extras=True)[field]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if hint is bool:
        return "true or false"
    kind, meta = get_args(hint)[:2]
    if meta.description:
        return str(meta.description)
    if kind is str:
        return "an absolute path" + (", or nothing" if meta.pattern.endswith("?$") else "")
    unit = unit_of(field)
    if unit is None:
        return f"a whole number from {meta.ge} to {meta.le}"
    return f"{NOUNS[unit]} from {FORMATTERS[unit](meta.ge)} to {FORMATTERS[unit](meta.le)}"


def _given(
    document: Mapping[str, Any], environment: Mapping[str, str], source: str, faults: list[str]
) -> Iterator[tuple[str, str, Any, str]]:
    """(section, key, value, where it stands) of everything given, the environment last; what does not exist is a fault."""
    for section, table in document.items():
        if section not in SECTIONS:
            faults.append(f"{source}: [{section}]: there is no such section: they are {', '.join(SECTIONS)}")
        elif not isinstance(table, Mapping):
            faults.append(f"{source}: {section} = {_shown(table)}: this is a section: write [{section}] and its keys below it")
        else:
            for key, value in table.items():
                if key in KEYS[section]:
                    yield section, key, value, f"{source}: {section}.{key}"
                else:
                    faults.append(
                        f"{source}: {section}.{key}: there is no such key: [{section}] has {', '.join(KEYS[section])}"
                    )
    for name, value in environment.items():
        if name == CONFIGURATION_VARIABLE or not name.startswith(PREFIX):
            continue
        if name in VARIABLES:
            yield *VARIABLES[name], value, name
        else:
            faults.append(f"{name}: there is no such setting: unset it, or see {CONFIGURATION.name} for the ones there are")


def _convert(section: str, field: str, value: Any) -> Any:
    """The value as the field's type.  Raises ValueError with what is accepted."""
    hint = get_type_hints(SECTIONS[section], include_extras=True)[field]
    unit = unit_of(field)
    try:
        if unit and isinstance(value, str):
            value = PARSERS[unit](value)
        # Not strict: a variable's value is text, and `"64"` in the file is as good as 64.
        return msgspec.convert(value, hint, strict=False)
    except QuantityError as error:
        raise ValueError(f"{error}; it must be {accepted(section, field)}") from None
    except msgspec.ValidationError:
        raise ValueError(f"it must be {accepted(section, field)}") from None


def _place_directories(given: dict[str, dict[str, Any]]) -> None:
    """Put image directories below STATE and RUN, unless nothing but defaults is asked for."""
    if not given["state"] and not given["run"]:
        return
    state = given["state"].get("dir", StateSection().dir)
    run = given["run"].get("dir", RunSection().dir)
    places = {"cache_dir": f"{state}/images/cache", "archive_dir": f"{state}/images/archives", "mount_dir": f"{run}/images"}
    given["image"] = places | given["image"]


def _with_directories(settings: Settings, changed: Callable[[str], str]) -> Settings:
    replace = msgspec.structs.replace
    image = settings.image
    return replace(
        settings,
        state=replace(settings.state, dir=changed(settings.state.dir)),
        run=replace(settings.run, dir=changed(settings.run.dir)),
        image=replace(
            image,
            cache_dir=changed(image.cache_dir),
            archive_dir=changed(image.archive_dir),
            mount_dir=changed(image.mount_dir),
        ),
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
