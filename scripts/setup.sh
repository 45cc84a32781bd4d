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
    amd64)
        packages+=(qemu-system-x86)
        kernel=linux-image-cloud-amd64 full_kernel=linux-image-amd64
        ;;
    arm64)
        packages+=(qemu-system-arm qemu-efi-aarch64)
        kernel=linux-image-cloud-arm64 full_kernel=linux-image-arm64
        ;;
    *) die "imgtool is set up on amd64 and arm64 only" ;;
esac
full_kernel_parts=(linux-image)
if grep -qx 'ID="\?ubuntu"\?' /etc/os-release; then
    kernel=linux-image-virtual full_kernel=linux-image-generic
    full_kernel_parts+=(linux-modules linux-modules-extra)
fi
if [ $with_tests = yes ]; then
    packages+=(
        mmdebstrap dosfstools ntfs-3g xfsprogs btrfs-progs e2fsprogs exfatprogs exfat-fuse mdadm
        cryptsetup-bin libhivex-bin python3-hivex fdisk parted psmisc attr strace shellcheck
        hyperfine zstd mtools xorriso genisoimage
        kpartx kmod busybox-static file udev iproute2 openssh-client
        runc golang-github-containers-common unzip acl gdisk squashfs-tools lz4 xxd bzip2 xz-utils mandoc jq
        zsh fish
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

# scripts/vm-run boots the kernel that has all modules. It is unpacked, not installed: in /boot,
# supermin would take it for the appliance, which then starts later, and on the user's machine it
# is not for tests to choose what is booted next.
vm_kernel=${XDG_CACHE_HOME:-$HOME/.cache}/imgtool/vm-kernel
has_vm_kernel() { compgen -G "$vm_kernel/lib/modules/*/modules.dep" > /dev/null; }
fetch_vm_kernel() {
    local version new package
    version=$(apt-cache show --no-all-versions "$full_kernel" \
        | sed -n 's/^Depends: .*\<linux-image-\([0-9][^ ,]*\).*/\1/p') || true
    [ -n "$version" ] || die "apt does not know $full_kernel" "run apt-get update"
    say "unpacking the kernel $version in $vm_kernel"
    mkdir -p "${vm_kernel%/*}"
    new=$(mktemp -d "$vm_kernel.XXXXXX")
    (
        trap 'rm -rf "$new"' EXIT
        cd "$new"
        apt-get -q -o APT::Sandbox::User=root download "${full_kernel_parts[@]/%/-$version}" >&2
        for package in *.deb; do dpkg -x "$package" .; done
        rm -- *.deb
        [ -e lib ] || ln -s usr/lib lib # where newer packages have the modules
        PATH=$PATH:/usr/sbin:/sbin depmod -b . "$version"
        chmod 755 .
        rm -rf "$vm_kernel"
        mv -T "$new" "$vm_kernel"
    )
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
needs_vm_kernel=no
if [ $with_tests = yes ] && ! has_vm_kernel; then needs_vm_kernel=yes; fi

apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600)
if [ ${#missing[@]} -gt 0 ] || [ $needs_vm_kernel = yes ]; then
    as_root "${apt[@]}" update >&2 || say "apt-get update failed: going on with the lists there are"
fi
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2 9<&-
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || die "still not installed: ${missing[*]}"
fi

add_setfiles_to_appliance
[ $needs_vm_kernel = no ] || fetch_vm_kernel

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
        --config-settings editable_mode=compat -e '.[dev,docs]') >&2
    "$venv/bin/python" -c 'import guestfs, nbd, parted' \
        || die "$venv does not see the bindings that the system's Python has"
    # The worker of the direct engine runs where nothing can be compiled into a cache.
    "$venv/bin/python" -m compileall -q "$root/imgtool"
    fingerprint > "$stamp"
fi
