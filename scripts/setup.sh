#!/usr/bin/env bash
# Makes this machine able to run imgtool: the Debian packages, the virtual environment, and what
# the libguestfs appliance needs on top. Does nothing, quickly, when everything is there.
#
#   scripts/setup.sh              for using, developing and testing imgtool
#   scripts/setup.sh --no-tests   without the Debian packages that only tests need
#
# Debian 12 and newer, Ubuntu 22.10 and newer (Python 3.11). Packages are installed as root or
# through sudo; everything else happens as the user who runs this.
set -euo pipefail

usage="usage: scripts/setup.sh [--no-tests]"
with_tests=yes
for word in "$@"; do
    case $word in
        --no-tests) with_tests=no ;;
        -h | --help) echo "$usage"; exit 0 ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=/usr/bin/python3 # never the first on PATH: the bindings belong to the system's own Python
venv=$root/.venv
stamp=$venv/imgtool-setup

say() { echo "setup: $*" >&2; }
die() {
    say "error: $1"
    [ $# -lt 2 ] || echo "  hint: $2" >&2
    exit 6
}

command -v apt-get > /dev/null \
    || die "this is neither Debian nor Ubuntu" "install the packages listed in scripts/setup.sh by hand"

# --no-install-recommends keeps desktops and servers out; the appliance's filesystems that are
# only recommended by libguestfs are therefore named here.
packages=(
    python3-guestfs guestfs-tools guestfish libguestfs-tools guestmount supermin
    libguestfs-xfs libguestfs-rsync libguestfs-hfsplus policycoreutils
    qemu-utils lvm2 fuse3 bubblewrap
    python3-venv python3-pip python3-libnbd python3-parted
)
case $(dpkg --print-architecture) in
    amd64) packages+=(qemu-system-x86) kernel=linux-image-cloud-amd64 ;;
    arm64) packages+=(qemu-system-arm qemu-efi-aarch64) kernel=linux-image-cloud-arm64 ;;
    *) die "imgtool is set up on amd64 and arm64 only" ;;
esac
if grep -qx 'ID="\?ubuntu"\?' /etc/os-release; then kernel=linux-image-virtual; fi
if [ $with_tests = yes ]; then
    packages+=(
        mmdebstrap dosfstools ntfs-3g xfsprogs btrfs-progs e2fsprogs exfatprogs mdadm
        cryptsetup-bin libhivex-bin python3-hivex fdisk parted psmisc attr strace shellcheck
        hyperfine zstd mtools xorriso genisoimage
    )
fi

# The appliance boots a kernel of the host, any that comes with its modules; a container has none.
has_kernel() {
    local image
    for image in /boot/vmlinu[xz]-*; do
        [ -e "$image" ] && [ -e "/lib/modules/${image#/boot/vmlinu[xz]-}/modules.dep" ] && return 0
    done
    return 1
}

missing_packages() {
    local installed package
    # Unknown names are what is looked for, so that dpkg-query's complaint is none. Packages of
    # another architecture print once more, and do no harm.
    installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2> /dev/null \
        || true)
    for package in "${packages[@]}"; do
        grep -qx "$package installed" <<< "$installed" || echo "$package"
    done
    has_kernel || echo "$kernel"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo > /dev/null; then
        sudo "$@"
    else
        die "root is needed to run: $*" "run scripts/setup.sh as root, or install sudo"
    fi
}

# libguestfs builds its appliance from these lists of packages; it leaves setfiles out, without
# which files put into an SELinux guest have no label. supermin rebuilds the appliance by itself.
add_setfiles_to_appliance() {
    local folder list
    folder=$({ dpkg-query -L libguestfs0 2> /dev/null || dpkg-query -L libguestfs0t64; } \
        | grep '/guestfs/supermin\.d$') || die "libguestfs has no supermin.d folder"
    list=$folder/packages-imgtool
    if [ ! -f "$list" ] || [ "$(cat "$list")" != policycoreutils ]; then
        say "adding setfiles to the libguestfs appliance"
        echo policycoreutils | as_root tee "$list" > /dev/null
    fi
}

fingerprint() {
    { echo "$root"; "$python" --version; cat "$root/scripts/setup.sh" "$root/pyproject.toml"; } \
        | sha256sum
}
venv_is_current() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && [ -x "$venv/bin/imgtool" ]
}

# Two set-ups of one tree at a time would break each other's environment.
exec 9< "$root"
flock 9

mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600)
    as_root "${apt[@]}" update >&2 || say "apt-get update failed: going on with the lists there are"
    as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2 9<&-
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || die "still not installed: ${missing[*]}"
fi

add_setfiles_to_appliance

if ! venv_is_current; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || die "$python is older than 3.11" "Debian 12 and Ubuntu 22.10 are the first with it"
    rm -f "$stamp"
    if ! "$venv/bin/python" -c 'import guestfs, nbd, parted, pip' 2> /dev/null; then
        say "making $venv"
        "$python" -m venv --clear --system-site-packages "$venv"
    fi
    say "installing imgtool and its development tools in $venv"
    (cd "$root" && "$venv/bin/python" -m pip install -q --no-warn-script-location \
        --config-settings editable_mode=compat -e '.[dev]') >&2
    "$venv/bin/python" -c 'import guestfs, nbd, parted' \
        || die "$venv does not see the bindings that the system's Python has"
    # The worker of the direct engine runs where nothing can be compiled into a cache.
    "$venv/bin/python" -m compileall -q "$root/imgtool"
    fingerprint > "$stamp"
fi
