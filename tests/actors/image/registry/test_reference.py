from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.image.errors import ReferenceInvalid
from actors.image.registry.reference import Reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("ubuntu:22.04", "docker.io/library/ubuntu:22.04"),
        ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
        ("index.docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
        ("library/ubuntu", "docker.io/library/ubuntu:latest"),
        ("bitnami/redis:7", "docker.io/bitnami/redis:7"),
        ("a/b/c", "docker.io/a/b/c:latest"),
        ("ghcr.io/owner/name", "ghcr.io/owner/name:latest"),
        ("localhost/name", "localhost/name:latest"),
        ("localhost:5000/name:tag", "localhost:5000/name:tag"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ("[::1]:5000/name", "[::1]:5000/name:latest"),
        ("host:5000/name", "host:5000/name:latest"),
        ("HOST/name", "HOST/name:latest"),
        ("name_with__all.of-the---separators", "docker.io/library/name_with__all.of-the---separators:latest"),
        (f"ubuntu@{DIGEST}", f"docker.io/library/ubuntu@{DIGEST}"),
        (f"ubuntu:22.04@{DIGEST}", f"docker.io/library/ubuntu:22.04@{DIGEST}"),
        (f"r.example:1/n@{DIGEST}", f"r.example:1/n@{DIGEST}"),
        ("n:" + "t" * 128, "docker.io/library/n:" + "t" * 128),
        ("n:_A.-9", "docker.io/library/n:_A.-9"),
    ],
)
def test_what_people_write_means_this_in_full(text: str, full: str) -> None:
    assert str(Reference.parse(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "Ubuntu", "ubuntu:", "ubuntu@", ":tag", "@" + DIGEST, "/ubuntu", "ubuntu/", "a//b", "a/../b", "../a", "./a",
        "a b", "a\n",
        "ubuntu:-tag", "ubuntu:a/b:c", "ubuntu:" + "t" * 129, "ubuntu:é", "übuntu", "a..b", "a___b", "-a", "a-",
        "_a", "a_", ".a",
        "ubuntu@sha256:abc", "ubuntu@" + DIGEST.upper(), "ubuntu@sha512:" + "0" * 128,
        f"ubuntu@{DIGEST}@{DIGEST}", f"ubuntu@{DIGEST}:tag",
        "host:port/name", "host:0/name", "host:65536/name", "host:/name", "-host.example/name", "ho_st.example/name",
        "[::1/name",
        "http://host.example/name", "host.example:80/", "host.example/" + "n" * 250, "a\0b", "ubuntu:lat\nest",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(ReferenceInvalid, match="expected "):
        Reference.parse(text)


def test_an_absurdly_long_reference_is_not_repeated_in_full() -> None:
    with pytest.raises(ReferenceInvalid) as caught:
        Reference.parse("N" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("registry", "loopback"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1", True), ("127.8.9.10:80", True), ("[::1]:5000", True),
        ("docker.io", False), ("128.0.0.1:5000", False), ("localhost.example", False), ("127.example:80", False),
        ("[::2]:5000", False),
    ],
)  # fmt: skip
def test_only_registries_on_this_machine_are_loopback(registry: str, loopback: bool) -> None:
    assert Reference.parse(f"{registry}/name").is_loopback is loopback


def test_the_digest_decides_what_is_wanted_and_then_the_tag() -> None:
    assert Reference.parse("n").wanted == "latest"
    assert Reference.parse("n:t").wanted == "t"
    assert Reference.parse(f"n:t@{DIGEST}").wanted == DIGEST
    assert str(Reference.parse("n:t").pinned(DIGEST)) == f"docker.io/library/n@{DIGEST}"


component = st.from_regex(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+){0,2}", fullmatch=True)


@given(
    st.sampled_from(["", "localhost/", "host.example/", "host.example:5000/", "127.0.0.1:1/"]),
    st.lists(component, min_size=1, max_size=4).map("/".join),
    st.from_regex(r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,20})?", fullmatch=True),
    st.sampled_from(["", "@" + DIGEST]),
)
def test_a_full_reference_parses_to_itself(registry: str, repository: str, tag: str, digest: str) -> None:
    assume(registry or "." not in repository.partition("/")[0])  # which would be a registry
    reference = Reference.parse(registry + repository + tag + digest)
    assert Reference.parse(str(reference)) == reference
    assert reference.tag or reference.digest


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except ReferenceInvalid:
        return
    assert Reference.parse(str(reference)) == reference
