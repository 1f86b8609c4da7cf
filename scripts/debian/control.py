"""The package's description and scripts for dpkg."""

from __future__ import annotations

#: The Pythons of Debian 12 and 13. An extension module's name has its Python's version in it, so those of
#: several are in one directory.
PYTHONS = ("3.11", "3.13")

ROOT = "usr/lib/hako"
PRISTINE = f"{ROOT}/package"

_CONTROL = """\
Package: hako
Version: {version}
Architecture: amd64
Maintainer: {maintainer}
Installed-Size: {installed_kib}
Depends: python3 (>= 3.11), {pythons}, qemu-system-x86 (>= 1:7.2),
 virtiofsd | qemu-system-common (<< 1:8), iproute2, util-linux
Recommends: containerd (>= 1.6) | containerd.io
Suggests: bash-completion
Section: admin
Priority: optional
Description: {summary}
 Hako is a runtime for containerd that runs every container, or Kubernetes pod,
 in its own small QEMU virtual machine. This package has the runtime and every
 Python library that it uses in its own directory: nothing is added to the
 system's Python.
 .
 After the installation, "hako install" tells containerd of the runtime and
 builds the guest's image.
"""

# `current` is switched in one step. Until then, and if anything fails, the old release serves.
_CONFIGURE = """\
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
root=/usr/lib/hako
release={release}
rm -f "$root/purged"
if [ ! -d "$root/$release" ]; then
    rm -rf "$root/.new"
    cp -al "$root/package" "$root/.new"
    python3 -IS -m compileall -q -s "$root/.new" -p "$root/$release" "$root/.new/packages" >/dev/null || true
    mv -T "$root/.new" "$root/$release"
fi
ln -sfn "$release" "$root/.current"
mv -T "$root/.current" "$root/current"
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
    systemctl try-restart hako-monitor.service || true
fi
"$root/current/bin/python" -I -m shim.commands.releases upgraded
if [ -n "$2" ]; then
    echo "hako: running sandboxes keep their release; new ones take {version}."
    echo "hako: run \\"hako install\\" to bring the guest's image up to date."
else
    echo "hako: run \\"hako install\\" to tell containerd of the runtime and to build the guest's image."
fi
"""

# Sandboxes that run keep what they need: their release, until the last of them ends.
_BEFORE_REMOVAL = """\
#!/bin/sh
set -e
case "$1" in
    remove|deconfigure) ;;
    *) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
    systemctl disable --now --quiet hako-monitor.service || true
fi
if [ -x /usr/lib/hako/current/bin/hako ]; then
    /usr/lib/hako/current/bin/hako uninstall --keep-image --keep-sandboxes ||
        echo "hako: something is left, as the line above says; the package is removed" >&2
fi
"""

# Python may be gone by now. A process that needs a release has its path on its command line. When it ends, it
# takes the same lock, and removes what the last one leaves: see shim/host/releases.py.
_AFTER_REMOVAL = """\
#!/bin/sh
set -e
root=/usr/lib/hako
data="/var/lib/hako /var/cache/hako /var/log/hako"
case "$1" in
    remove|purge|disappear) ;;
    *) exit 0 ;;
esac
used=
if { command exec 9<"$root"; } 2>/dev/null; then
    flock --timeout 10 9 || true
    rm -rf "$root/current" "$root/.new" "$root/.current"
    for release in "$root"/*; do
        [ -d "$release" ] && [ "$release" != "$root/package" ] || continue
        if grep -qsaF "$release/" /proc/[0-9]*/cmdline; then used=yes; else rm -rf "$release"; fi
    done
fi
if [ "$1" = purge ]; then
    if [ -n "$used" ]; then
        printf '%s\\n' $data >"$root/purged"
        echo "hako: sandboxes run; the last one removes $data when it ends"
    else
        rm -rf $data
    fi
    rmdir --ignore-fail-on-non-empty /etc/hako/config.d /etc/hako 2>/dev/null || true
fi
rmdir --ignore-fail-on-non-empty "$root" 2>/dev/null || true
"""


def control(*, version: str, summary: str, maintainer: str, installed_kib: int) -> str:
    """Write the description.

    :param version: Hako's.
    :param summary: one line.
    :param maintainer: who answers for it.
    :param installed_kib: how much room it takes.
    """
    return _CONTROL.format(
        version=version,
        summary=summary,
        maintainer=maintainer,
        installed_kib=installed_kib,
        pythons=" | ".join(f"python{python}" for python in reversed(PYTHONS)),
    )


def scripts(*, version: str, release: str) -> dict[str, str]:
    """Write what dpkg runs, by name.

    :param version: Hako's.
    :param release: the name of the directory that becomes the release's.
    """
    return {
        "postinst": _CONFIGURE.format(version=version, release=release),
        "prerm": _BEFORE_REMOVAL,
        "postrm": _AFTER_REMOVAL,
    }
