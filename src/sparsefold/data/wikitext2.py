"""WikiText-2: good and featured articles of Wikipedia, with case, numbers and punctuation."""

from __future__ import annotations

from sparsefold.data._fetch import File, Published

_URL = (
    "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
    "word_language_model/data/wikitext-2/"
)

WIKITEXT2 = Published(
    name="wikitext2",
    folder="wikitext-2",
    files=tuple(
        File(f"wiki.{split}.tokens", f"{_URL}{split}.txt", size, sha256)
        for split, size, sha256 in (
            ("train", 10797148, "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f"),
            ("valid", 1121681, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
            ("test", 1256449, "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
        )
    ),
    words=(2_088_628, 217_646, 245_569),
    types=33_278,
    licence="Licence: Creative Commons Attribution-ShareAlike 3.0 (Wikipedia's authors; Salesforce Research).",
)
