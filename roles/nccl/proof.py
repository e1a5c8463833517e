"""Asks the library that the loader finds for its version, and the package manager whether its files are whole."""

from __future__ import annotations

from roles.core.role import Target
from roles.core.steps import quote
from roles.nccl.probe import DAMAGE
from roles.nccl.spec import DEBS, RPMS, NcclSpec, environment_of

# ncclGetVersion counts 2.21.5 as 22105 (since 2.9; before as 2805). It needs neither GPU nor driver.
_ASK = """
import ctypes
number = ctypes.c_int()
ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
big, small = divmod(number.value, 10000 if number.value >= 10000 else 1000)
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/libnccl" in line}
print("%d.%d.%d" % (big, small // 100, small % 100), " ".join(sorted(paths)))
"""


def proof(target: Target[NcclSpec]) -> str:
    """Shell; what is wrong in the packages' files is left for the everyday look, which repairs it."""
    one = environment_of(target.spec, target.cluster)
    own = f"{quote(f'{one.prefix}/bin/python')} " if one else ""
    return f"""
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
damage=
if command -v dpkg-query >/dev/null; then
  have=$(dpkg-query -W -f '${{Version}}' {DEBS[0]} 2>/dev/null) || have=
  names=
  for n in {" ".join(DEBS)}; do
    if dpkg-query -W "$n" >/dev/null 2>&1; then names="$names $n"; fi
  done
  damage=$(dpkg --verify $names 2>&1) || true
else
  have=$(rpm -q --qf '%{{VERSION}}-%{{RELEASE}}' {RPMS[0]} 2>/dev/null) || have=
  names=
  for n in {" ".join(RPMS)}; do
    if rpm -q "$n" >/dev/null 2>&1; then names="$names $n"; fi
  done
  damage=$(rpm -V $names 2>&1) || true
fi
test -n "$have" || {{ printf 'nccl-missing\\tits package is not installed\\n'; exit 0; }}
damage=$(printf '%s\\n' "$damage" | grep -E 'libnccl|nccl[.]h' | while read -r line; do printf '%s, ' "${{line##* }}"; done)
if test -n "$damage"; then
  mkdir -p {DAMAGE.rpartition("/")[0]}
  printf '%s not as delivered\\n' "${{damage%, }}" > {DAMAGE}
  printf 'nccl-damaged\\t%s not as delivered\\n' "${{damage%, }}"
  exit 0
fi
rm -f {DAMAGE}
for python in {own}/usr/bin/python3 /usr/libexec/platform-python ''; do
  if test -x "$python"; then break; fi
done
test -n "$python" || exit 0
said=$(env -i HOME=/root PATH=/usr/bin:/bin "$python" -c {quote(_ASK.strip())} 2>&1) || {{
  printf 'nccl-damaged\\tlibnccl.so.2 cannot be loaded: %s\\n' "$(printf '%s\\n' "$said" | tail -n 1)"; exit 0; }}
case $said in
  "${{have%%-*}} "*) ;;
  *) printf 'nccl-version-mismatch\\tthe loader finds %s, and the package is %s\\n' "$said" "$have";;
esac
""".strip()
