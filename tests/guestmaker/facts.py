"""What is in the test guests: the recipes build it, the tests assert on it."""

from __future__ import annotations

# Every guest with an operating system, unless said otherwise.
HOSTNAME = "dead-guest"
ALICE = (1000, 1000)  # uid and gid of the only ordinary user
KERNEL = "6.1.0-test"
DEBIAN_MAJOR = 12  # plain and lvm have a real one, of whatever point release is current
LETTER = b"Dear guest,\nyou are not running.\n"  # /home/alice/letter.txt
NOTES = bytes(range(256)) * 64  # /home/alice/documents/notes.bin

PASSPHRASE = "correct horse"  # luks, luks1-in-lvm

# plain
PLAIN_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000001"

# lvm, and the overlays on it
ESP_UUID = "ABCD-1234"
BOOT_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000002"
ROOT_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000003"
HOME_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000004"
SWAP_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000005"
LVM_LAYOUT = {
    "/": "/dev/debian-vg/root",
    "/boot": "/dev/sda2",
    "/boot/efi": "/dev/sda1",
    "/home": "/dev/debian-vg/home",
}
LVM_SIZE = 4 << 30
LVM_FILESYSTEMS = {  # device: type, label, UUID, size of the block device in bytes
    "/dev/sda1": ("vfat", "ESP", ESP_UUID, 64 << 20),
    "/dev/sda2": ("ext4", "boot", BOOT_UUID, 256 << 20),
    "/dev/debian-vg/root": ("ext4", "root", ROOT_UUID, 2304 << 20),
    "/dev/debian-vg/home": ("xfs", "home", HOME_UUID, 512 << 20),
    "/dev/debian-vg/swap": ("swap", "swap", SWAP_UUID, 256 << 20),
}
OVERLAY1_FILE = ("/etc/overlay1", b"written in overlay1\n")  # seen in overlay1 and overlay2
OVERLAY2_FILE = ("/etc/overlay2", b"written in overlay2\n")  # seen in overlay2 alone

# btrfs, md, luks, luks1-in-lvm
BTRFS_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000006"
MD_VG, LUKS_VG, LUKS1_VG = "md-vg", "luks-vg", "outer-vg"
MD_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000007"
LUKS_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000008"  # of the LUKS2 container
LUKS1_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000009"  # of the LUKS1 container

# windows
WINDOWS_PRODUCT = "Windows 10 Pro"
WINDOWS_VERSION = (10, 0)
WINDOWS_HOSTNAME = "DEADWINDOWS"
WINDOWS_LETTER = b"Dear Alice,\r\nregards, the registry.\r\n"  # Users/Alice/Documents/letter.txt

# data, twodata, twodisk
DATA_UUID = "5f1d3a52-0f8b-4b6c-9d31-00000000000a"
DATA_FILES = {"/readme.txt": b"a data disk\n", "/photos/cat.raw": b"\x00\xffcat" * 1000}
PHOTOS_UUID = "5f1d3a52-0f8b-4b6c-9d31-00000000000b"  # twodata, ext4, /dev/sda1
BACKUP_UUID = "5f1d3a52-0f8b-4b6c-9d31-00000000000c"  # twodata, ext2, /dev/sda2
TWODISK_ROOT_UUID = "5f1d3a52-0f8b-4b6c-9d31-00000000000d"
TWODISK_DATA_UUID = "5f1d3a52-0f8b-4b6c-9d31-00000000000e"  # mounted at /srv
TWODISK_FILE = ("/srv/served.txt", b"from the second disk\n")

# multiboot: device, distribution, version, hostname
MULTIBOOT = (
    ("/dev/sda1", "debian", "12", "dead-debian"),
    ("/dev/sda2", "fedora", "40", "dead-fedora"),
)
MULTIBOOT_UUIDS = (
    "5f1d3a52-0f8b-4b6c-9d31-00000000000f",
    "5f1d3a52-0f8b-4b6c-9d31-000000000010",
)

# selinux: the label of each file, and what the guest's policy gives to new ones
SELINUX_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000011"
SELINUX_LABELS = {
    "/etc/hostname": "system_u:object_r:hostname_etc_t:s0",
    "/etc/shadow": "system_u:object_r:shadow_t:s0",
    "/etc/fstab": "system_u:object_r:etc_t:s0",
    "/home/alice": "unconfined_u:object_r:user_home_dir_t:s0",
    "/home/alice/letter.txt": "unconfined_u:object_r:user_home_t:s0",
    "/usr/bin/bash": "system_u:object_r:shell_exec_t:s0",
}
SELINUX_NEW = {  # a path that is not there: the label that a file copied there has to get
    "/etc/new.conf": "system_u:object_r:etc_t:s0",
    "/home/alice/new": "unconfined_u:object_r:user_home_t:s0",
    "/srv/www/index.html": "system_u:object_r:default_t:s0",
}

# liar: its root is sound, its fstab is not
LIAR_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000012"
LIAR_MISSING_UUID = "deadbeef-dead-beef-dead-beefdeadbeef"
LIAR_MISSING_LV = "/dev/mapper/gone--vg-gone"
LIAR_DATA_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000013"
LIAR_DATA_MOUNTPOINT = "/srv/my data"  # written as /srv/my\040data; it exists and is right

# awkward
AWKWARD_SIZE = 10 << 30
AWKWARD_NAMES = {  # under /names; the content of each is its own name
    "newline": b"two\nlines",
    "escape": b"\x1b[31mred\x1b[0m",
    "longest": b"n" * 255,
    "not-utf8": b"\xff\xfe-not-utf8",
    "dash": b"-rf",
    "space": b" leading and trailing ",
    "tab": b"a\ttab",
    "quote": b'it\'s "quoted" $HOME `id` \\',
    "utf8": "żółw-日本".encode(),
    "star": b"*",
    "carriage-return": b"over\rwritten",
    "c1-control": b"\xc2\x9b31mcsi",
}
SPARSE_FILE = "/sparse.bin"
SPARSE_SIZE = 8 << 30
SPARSE_ISLANDS = {  # offset: data there; zeros and holes all round
    0: b"first island" + bytes(4084),
    (4 << 30) + 4096: b"middle island".ljust(4096, b"."),
    (8 << 30) - 4096: b"last island".rjust(4096, b"."),
}
AWKWARD_LINKS = {  # under /links
    b"absolute": b"/etc/passwd",
    b"dangling": b"/no/such/file",
    b"loop-a": b"loop-b",
    b"loop-b": b"loop-a",
    b"self": b"self",
    b"up": b"../../../../../../../../etc/passwd",
    b"to-etc": b"/etc",
    b"up-to-etc": b"../../../../../../../../etc",
    b"good": b"../plain.txt",
    b"not-utf8": b"\xff\xfe",
    b"escape": b"\x1b[31mred",
}
AWKWARD_PASSWD = b"root:x:0:0:the guest's own passwd:/root:/bin/sh\n"  # /etc/passwd in the guest
AWKWARD_DEVICES = {  # under /special
    "null": ("char", 1, 3),
    "disk": ("block", 8, 0),
    "high": ("char", 300, 70000),
}
HARD_LINKS = ("/hard/one", "/hard/two", "/hard/deeper/three")  # one file, content b"linked\n"
AWKWARD_XATTRS = {  # of /xattrs.txt
    "user.comment": b"hello",
    "user.binary": b"\x00\xff\n",
    "security.selinux": b"system_u:object_r:etc_t:s0\x00",
}
AWKWARD_MODES = {  # under /modes; ("sticky" and "setgid" are directories)
    "setuid": 0o4755,
    "setgid": 0o2775,
    "sticky": 0o1777,
    "none": 0o000,
    "odd-owner": 0o640,
}
ODD_OWNER = (54321, 4000000000)  # of /modes/odd-owner
AWKWARD_TIMES = {  # under /times, in nanoseconds since 1970
    "nanoseconds": 1614834367_123456789,
    "year-2100": 4102444800_000000001,
    "year-1965": -157766400_000000000,
    "epoch": 0,
}

MANY_FILES = 50_000  # many: /d/file-00000 to /d/file-49999, empty

# nofs: /dev/sda1 has no superblock, /dev/sda2 is ext4 that does not mount, /dev/sda3 is good
NOFS_BROKEN_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000014"
NOFS_GOOD_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000015"
NOFS_GOOD_FILE = ("/survivor.txt", b"still here\n")

# damaged
DAMAGED_UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000016"
DAMAGED_GOOD = {"/a-good.txt": b"first\n", "/tree/good.txt": b"inside\n", "/z-good.txt": b"last\n"}
DAMAGED_UNREADABLE = "/tree/unreadable.bin"  # lstat works, read fails
DAMAGED_UNREADABLE_SIZE = 20 * 8192 - 4096
DAMAGED_HALF = "/tree/half.bin"  # reads for at least DAMAGED_HALF_READABLE bytes, then fails
DAMAGED_HALF_SIZE = 1000 * 8192 - 4096  # 4 KiB of "#" every 8 KiB, holes between
DAMAGED_HALF_READABLE = 1 << 20
DAMAGED_INODE = "/tree/bad-inode.txt"  # the directory lists it, lstat fails
