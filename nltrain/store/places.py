"""Places: what a path or URL of a config field or a command line means, before anything is opened there.

An `s3://bucket/key` is taken to the last character: `#`, `?`, `%`, spaces and double slashes are part of a key. A local
path is made absolute where the command runs. A submitted job does not run in the user's folder, so there a relative
path is refused, with the form to write instead. Opens no storage: standard library only.
"""

import os
import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from nltrain.errors import UserError

SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job server sets it for the process that it starts."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)


class PlaceError(UserError, ValueError):
    """A path or URL that names no place that we can read or write; the message says what to write."""


class S3Place(NamedTuple):
    """Where an s3:// URL points."""

    bucket: str
    prefix: str
    """Without the slash that may end a folder's URL; empty: the bucket itself."""


class OtherPlace(NamedTuple):
    """Where a URL of one of OTHER_SCHEMES points; its store reads the rest."""

    scheme: str
    rest: str
    """What follows `scheme:/`."""


OTHER_SCHEMES: tuple[str, ...] = ()
"""Schemes of further stores, in small letters; open.py says which class each one means."""


def parse_place(place: str) -> S3Place | OtherPlace | str:
    """The bucket and prefix of an s3:// URL, or the local path of a path or file:// URL (`~` is expanded).

    Raises PlaceError for an empty place, another scheme, a missing bucket or a file URL that names a host.
    """
    if not place:
        raise PlaceError("store URL is empty: give s3://bucket/prefix or a folder")
    if "\0" in place:
        raise PlaceError(f"{place!r}: no path or URL may hold a NUL character: leave it out")
    match = _SCHEME.match(place)
    if match is None:
        return os.path.expanduser(place)
    scheme, rest = match[1].lower(), place[match.end() :]
    if scheme == "s3":
        if not rest.startswith("/"):
            raise PlaceError(f"{place}: an S3 URL has two slashes: s3://{rest}")
        bucket, _, prefix = rest[1:].partition("/")
        if not bucket:
            raise PlaceError(f"{place}: no bucket: give s3://bucket/prefix")
        return S3Place(bucket, prefix.removesuffix("/"))
    if scheme == "file":
        path = "/" + rest
        if rest.startswith("/"):
            host, _, below = rest[1:].partition("/")
            if host not in ("", "localhost"):
                raise PlaceError(f"{place}: a file URL has three slashes: file:///{host}/{below}")
            path = "/" + below
        return unquote(path)
    if scheme in OTHER_SCHEMES:
        return OtherPlace(scheme, rest)
    raise PlaceError(f"{place}: scheme {scheme!r} is not supported: give s3://bucket/prefix or a folder")


def is_submitted_job() -> bool:
    """Whether this process is a job that `ray job submit` started: it runs in a folder of Ray's, not in the user's."""
    return SUBMITTED_VARIABLE in os.environ


def absolute_place(field: str, place: str, submitted: bool | None = None) -> str:
    """The place that config field `field` names, in a form that means the same in every process and folder.

    An s3:// URL stays as it is, and so does an empty one (the field is not set). A local path, also one written as
    file:// or with `~`, becomes absolute, relative to the working directory. submitted: whether this is a submitted job
    (None: the environment says so); then a relative path is refused, because the user's folder is not known here.
    Raises PlaceError in one line: field, value, what to write.
    """
    if not place:
        return place
    try:
        found = parse_place(place)
    except PlaceError as error:
        raise PlaceError(f"{field}: {error}") from None
    if not isinstance(found, str):
        return place
    if is_submitted_job() if submitted is None else submitted:
        if place.startswith("~"):
            raise PlaceError(
                f"{field}={place!r}: the home folder of a submitted job is the cluster's, not yours: write "
                f"{field}=$HOME{place[1:] if place[1:2] in ('', '/') else '/...'} in your shell, or an s3:// URL"
            )
        if not found.startswith("/"):
            raise PlaceError(
                f"{field}={place!r}: a relative path, but a submitted job does not run in your folder: write "
                f"{field}=$PWD/{place.removeprefix('./')} in your shell, or an s3:// URL"
            )
    # What is before a `..` may be a link: then only the file system knows where it leads.
    return os.path.realpath(found) if ".." in found.split("/") else os.path.abspath(found)


def join_url(url: str, *names: str) -> str:
    """The URL of a folder or object below `url`; names are taken as they are, empty ones left out."""
    for name in names:
        if name:
            url = f"{url.removesuffix('/')}/{name}"
    return url


def split_url(url: str) -> tuple[str, str]:
    """(URL of the folder, last name) of what lies in a folder: the inverse of join_url."""
    folder, _, name = url.removesuffix("/").rpartition("/")
    # A slash that belongs to the folder's key is followed by the one that ends its URL.
    is_key = folder.endswith("/") and isinstance(parse_place(folder), S3Place)
    return f"{folder}/" if is_key else folder, name


def as_uri(url: str) -> str:
    """The URL for a library that parses it as a URI (Arrow, and with it Ray): the key's characters quoted.

    Raises PlaceError for a key with an empty part: Arrow has no way to write one.
    """
    place = parse_place(url)
    if not isinstance(place, S3Place):
        return url
    if "//" in f"/{place.prefix}/":
        raise PlaceError(f"{url}: a run cannot lie below a key with // in it, which Ray cannot write: leave one / out")
    return f"s3://{place.bucket}/{quote(place.prefix)}"


def shown(text: str) -> str:
    """`text` for a message: one line that any terminal takes (control characters and broken UTF-8 are escaped)."""
    if text.isprintable():
        return text
    clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clean)
