"""What must come of some of the images, where it is known without imgtool.

By the end of an image's path, then by command: see `tests.corpus.look.look`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _unreplayed(count: int) -> Mapping[str, Any]:
    """A tree that is read without its journal: how many names it has, by debugfs -c."""
    words = ("ls", "-R", "{image}", "/", "-m", "/dev/sda:/:noload", "-o", "jsonl")
    return {"unreplayed": {"words": (*words, "--engine", "{engine}"), "status": 0, "count": count}}


def _paths(*names: str) -> list[dict[str, str]]:
    return [{"path": name} for name in names]


def _type(name: str) -> Mapping[str, Any]:
    """What the direct engine lists."""
    return {"filesystems": {"status": 0, "rows": [{"type": name}]}}


def _named(name: str) -> Mapping[str, Any]:
    """What the direct engine leaves to the appliance: it says what it is."""
    return {"filesystems": {"status": 3, "says": f"the direct engine does not read this: {name}"}}


def _table(name: str, count: int) -> Mapping[str, Any]:
    return {"partitions": {"status": 0, "rows": [{"table": name}], "count": count}}


EXPECTED: Mapping[str, Mapping[str, Any]] = {
    # fsck.fat: a chain of clusters that runs in a circle, after 3 clusters of 4096 bytes.
    "dosfstools/tests-check-circular_chain.fsck": {
        "ls": {"status": 1},
        "copy-out": {"status": 1},
    },
    # e2fsck -fn and debugfs -c say what is wrong with each, and what is there.
    "e2fsprogs/tests-f_ext_journal-image": _unreplayed(79),
    "e2fsprogs/tests-j_corrupt_sb_magic-image": _unreplayed(2),
    "e2fsprogs/tests-f_salvage_dir-image": {
        "ls": {
            "status": 1,
            "rows": _paths("/test/a", "/test/b", "/test/c", "/test2/a", "/test2/b"),
        },
    },
    "e2fsprogs/tests-f_htree_leaf_csum-image": {
        "ls": {"status": 1, "says": "a block of a directory is damaged (/x)"},
    },
    "e2fsprogs/tests-f_extents2-image": {
        "ls": {"status": 1, "rows": _paths("/extent.c")},
        "copy-out": {"status": 1, "says": "/extent.c"},
    },
    "e2fsprogs/tests-f_ext_zero_len-image": {
        "ls": {"status": 1, "rows": _paths("/issue")},
        "copy-out": {"status": 1, "says": "/issue"},
    },
    # blkid and file(1).
    "util-linux/tests-ts-blkid-images-fs-udf-hdd-mkudffs-1.3-5.img": _named("/dev/sda is udf"),
    "util-linux/tests-ts-blkid-images-fs-erofs.img": _named("/dev/sda is erofs"),
    "util-linux/tests-ts-blkid-images-fs-ddf-raid.img": _named("firmware RAID"),
    "util-linux/tests-ts-blkid-images-fs-vmfs_volume.img": _type("VMFS_volume_member"),
    "util-linux/tests-ts-blkid-images-fs-luks1.img": _type("crypto_LUKS"),
    "util-linux/tests-ts-blkid-images-fs-f2fs.img": _named("/dev/sda is f2fs"),
    "util-linux/tests-ts-blkid-images-fs-hfsplus.img": _named("/dev/sda is hfsplus"),
    # fdisk has one more of the Sun's: it stands for the whole disk.
    "util-linux/tests-ts-blkid-images-pt-sun.img": _table("sun", 2),
    "util-linux/tests-ts-blkid-images-pt-atari-primary.img": _table("atari", 1),
    # fsck.exfat: the bitmap has a cluster of a file as free. fls shows these names.
    "exfatprogs/tests-bad_bitmap-exfat.img": {
        "ls": {
            "status": 0,
            "count": 11,
            "rows": [
                {"path": "/child_01"},
                {"path": "/dir_01"},
                {"path": "/dir_01/child_04"},
                {"path": "/dir_01/bad_child_01"},
                {"path": "/dir_01/child_05"},
                {"path": "/child_02"},
            ],
        },
        "copy-out": {"status": 0},
    },
    # fsck.exfat: 8192 bytes are allocated, and the size is more; the other has more than its size.
    "exfatprogs/tests-bad_file_size-exfat.img": {
        "ls": {"status": 1, "says": "too short (/dir_01/bad_child_01)", "count": 11},
        "copy-out": {"status": 1},
    },
    # fsck.exfat: a chain with the mark of a bad cluster, and one that ends too early.
    "exfatprogs/tests-bad_num_chain-exfat.img": {
        "ls": {"status": 1, "says": "broken (/dir_01/bad_child_01)", "count": 11},
        "copy-out": {"status": 1, "says": "/dir_02/bad_child_02"},
    },
    "exfatprogs/tests-large_file_invalid_clus-exfat.img": {
        "ls": {"status": 1, "says": "broken (/file_192m)", "rows": [{"path": "/file_192m"}]},
        "copy-out": {"status": 1},
    },
    # fsck.exfat: a chain that runs in a circle; the other is only longer than its file.
    "exfatprogs/tests-loop_chain-exfat.img": {
        "ls": {"status": 1, "says": "circle (/dir_02/bad_child_02)", "count": 11},
        "copy-out": {"status": 1},
    },
    # fsck.exfat: one cluster in two files. Which of them has a right to it is not to be told.
    "exfatprogs/tests-duplicate_clu-exfat.img": {
        "ls": {"status": 1, "says": "in use by another file (/dir_02/bad_child_02)", "count": 11},
        "copy-out": {"status": 1},
    },
    # What Linux takes otherwise than it is written, or not at all, is refused by the direct engine.
    "exfatprogs/tests-bs_bad_csum-exfat.img": {
        "ls": {"status": 3, "says": "checksum of the boot region"},
    },
    "exfatprogs/tests-de_bad_csum-exfat.img": {
        "ls": {"status": 3, "says": "an entry with a wrong checksum"},
    },
    "exfatprogs/tests-duplicated_name-exfat.img": {
        "ls": {"status": 3, "says": "two entries of one name"},
    },
    "exfatprogs/tests-rename_dot_entry-exfat.img": {
        "ls": {"status": 3, "says": "a name on exFAT is impossible"},
    },
}
