"""The shell that reads, compares and replaces the files of a synchronised directory, on whichever machine.

A manifest is a text file with a line for the directory itself (``.``) and each name below it: hash, kind
(f, l, d), size in bytes (of a directory: its mode), time of change in seconds, path, target; parted by tabs,
sorted by path. Without its first column it is a listing, which needs no file opened. Nothing here depends on
Python: nodes need none.
"""

from __future__ import annotations

from roles.core.mirror import LOCK
from roles.core.steps import settled

SOURCE, MANIFEST, WANTED = "source", "manifest", "wanted"
"""Manifests in the notes: of the directory that is given, of what lies in place, of what is to lie there."""
DAMAGED = "damaged"
"""In the notes: paths whose hash was found wrong."""
DOUBT = "doubt"
"""In the notes of what is given: paths whose hash is read again next time."""

SHOWN = 3
"""Paths that a look shows of each kind that is wrong."""

LIST = r"""
LC_ALL=C; export LC_ALL
tab=$(printf '\t')
# list: the listing of the current directory; kind x: a name that no line can hold; kind u: not all could be read.
list() {
  { find . -name '.nfs*' -prune -o ! -name .lockstep-damaged \( -type d -printf 'd\t%m\t0\t%P\t\n' -o \
      -printf '%y\t%s\t%T@\t%P\t%l\n' \) 2>/dev/null ||
    printf 'u\t0\t0\ta directory that cannot be read\t\n'; } |
  awk -F '\t' -v OFS='\t' '
    NF == 5 && $1 == "d" && $4 == "" { $4 = "." }
    NF != 5 || $4 == "" || index($4, "\\") || index($4, "\r") { print "x", 0, 0, (NF > 3 && $4 != "" ? $4 : $1), ""; next }
    { if ($1 == "f") sub(/[.].*/, "", $3); else if ($1 != "d") $2 = $3 = 0; print }' |
  sort -t "$tab" -k 4
}
# digest: of a listing.
digest() { sha256sum | cut -c -64; }
# listed MANIFEST: its listing.
listed() { cut -f 2- "$1"; }
# lines: on standard input, to what xargs -0 takes.
lines() { sed 's|^|./|' | tr '\n' '\0'; }
# clean: names as others wrote them, without the bytes that are no UTF-8, which pyinfra cannot read.
clean() { if command -v iconv >/dev/null; then iconv -c -f UTF-8 -t UTF-8 || :; else cat; fi; }
# damaged: of what sha256sum -c says, the paths whose hash is another one, or that it could not read.
damaged() { sed -n 's#^\./\(.*\): FAILED\( open or read\)\{0,1\}$#\1#p'; }
"""

REFUSE = r"""
# refused FILE: why a directory with this listing cannot be given, in words; nothing where it can.
refused() {
  if command -v iconv >/dev/null && ! iconv -f UTF-8 -t UTF-8 <"$1" >/dev/null 2>&1; then
    echo 'it holds a name that is no UTF-8'; return; fi
  awk -F '\t' '
    function no(why) { print "it holds " why; said = 1; exit }
    $1 == "x" { no("a name with a line break, a tab or a backslash: " $4) }
    $1 == "u" { no($4) }
    $1 == "f" { files++; next }
    $1 == "d" { next }
    $1 != "l" { no($4 ", which is no file, directory or link") }
    { depth = split($4, part, "/") - 1; n = split($5, part, "/"); out = part[1] == ""; down = 0
      # Upwards at the beginning alone: behind another link, one step up leads anywhere.
      for (i = 1; i <= n; i++) { if (part[i] == "..") { depth--; if (down) out = 1 }
        else if (part[i] != "." && part[i] != "") down = 1
        if (depth < 0) out = 1 }
      if (out) no("the link " $4 ", which leads out of it, to " $5) }
    END { if (!said && !files) print "it holds no file" }' "$1"
}
"""

COMPARE = rf"""
# compare MANIFEST DAMAGED: what of the listing on standard input is not as the manifest says.
compare() {{
  awk -F '\t' '
    function wrong(path) {{ print "wrong " path slash[path] }}
    part == 1 {{ bad[$0] = 1; next }}
    part == 2 {{ want[$5] = $2 FS $3 FS $4 FS $6; if ($2 == "d") slash[$5] = "/"; next }}
    $1 == "u" {{ next }}  # it went while it was looked at
    !($4 in want) {{ if ($1 != "d") print "stray " $4; next }}
    {{ if (want[$4] != $1 FS $2 FS $3 FS $5 || $4 in bad) wrong($4); delete want[$4] }}
    END {{ for (path in want) wrong(path); print "compared" }}' part=1 "$2" part=2 "$1" part=3 - | sort |
  awk '$1 == "compared" {{ whole = 1; next }} ++n[$1] <= {SHOWN}
    END {{ if (whole) {{ print "wrongs " n["wrong"] + 0; print "strays " n["stray"] + 0 }} }}'
}}
"""

READ = rf"""
{LIST}{REFUSE}
# Reads $directory into the manifest $notes/{SOURCE}; hashes of what has the same size and time are kept.
umask 022; mkdir -p "$notes"
if ! cd "$directory"; then echo "there is no directory $directory to be read" >&2; exit 1; fi
list >"$notes/listing"
why=$(refused "$notes/listing")
if test -n "$why"; then printf '%s\n' "$directory cannot be given to the nodes: $why" | clean >&2; exit 1; fi
known=$notes/known; : >"$known"
if test -f "$notes/{SOURCE}"; then
  doubt=$notes/{DOUBT}; test -f "$doubt" || doubt=/dev/null
  # Not of what changed in the last moments before it was read then: it may have changed again at the same time.
  awk -F '\t' -v then="$(stat -c %Y "$notes/{SOURCE}")" '
    part == 1 {{ doubt[$0] = 1; next }}
    $2 == "f" && $4 < then - 2 && !($5 in doubt)' part=1 "$doubt" part=2 "$notes/{SOURCE}" >"$known"
fi
awk -F '\t' '
  part == 1 {{ hash[$5 FS $3 FS $4] = $1; next }}
  $1 == "f" && !(($4 FS $2 FS $3) in hash) {{ print $4 }}' part=1 "$known" part=2 "$notes/listing" >"$notes/unread"
lines <"$notes/unread" | xargs -0 -r sha256sum -- 2>"$notes/said" |
awk -v name="$name" -v sums="$notes/sums" '
  BEGIN {{ FS = "\t"; printf "" >sums }}
  part == 1 {{ size[$4] = $2; next }}
  part == 2 {{ all += size[$0]; next }}
  {{ print >sums; done += size[substr($0, 69)]
     if (all > 100000000 && int(10 * done / all) > told) {{ told = int(10 * done / all)
       printf "%s: %d of %d MB read (%d %%)\n", name, done / 1000000, all / 1000000, 100 * done / all; fflush() }} }}' \
  part=1 "$notes/listing" part=2 "$notes/unread" part=3 -
awk -F '\t' -v OFS='\t' '
  part == 1 {{ hash[$5 FS $3 FS $4] = $1; next }}
  part == 2 {{ fresh[substr($0, 69)] = substr($0, 1, 64); next }}
  $1 != "f" {{ print "-", $0; next }}
  ($4 FS $2 FS $3) in hash {{ print hash[$4 FS $2 FS $3], $0; next }}
  $4 in fresh {{ print fresh[$4], $0; next }}
  {{ print $4 >"/dev/stderr"; exit 1 }}' part=1 "$known" part=2 "$notes/sums" part=3 "$notes/listing" \
  >"$notes/new" 2>"$notes/missing" || {{ echo "$directory/$(head -n 1 "$notes/missing") cannot be read" | clean >&2; exit 1; }}
list >"$notes/again"
if ! cmp -s "$notes/listing" "$notes/again"; then
  echo "$directory changed while it was read: converge again when nothing changes it" >&2; exit 1; fi
touch -r "$notes/listing" "$notes/new"
mv -f "$notes/new" "$notes/{SOURCE}"
cd "$notes"; rm -f listing again unread sums said missing known {DOUBT}
"""
"""Variables: name, directory, notes. Says on standard output how much is read."""

SURVEY = rf"""
{LIST}
# What $place lacks of $notes/{WANTED}: paths in $notes/lacking. Prints the bytes and the number of files to come.
no() {{ rmdir "$landing" 2>/dev/null || :; printf '%s\n' "$1" | clean >&2; exit 1; }}
umask 022; cd "$notes"
: >there
if test -d "$place"; then (cd "$place" && list) >there
elif test -e "$place" || test -L "$place"; then no "$place is no directory: move it away, and converge again"; fi
odd=$(awk -F '\t' '$1 == "x" {{ print $4; exit }}' there)
if test -n "$odd"; then
  no "$place holds a name with a line break, a tab or a backslash, $odd: move it away, and converge again"; fi
if grep -q "^u$tab" there; then no "$place changed while it was looked at: converge again when nothing changes it"; fi
known={MANIFEST}; test -f "$known" || known=/dev/null
bad={DAMAGED}; test -f "$bad" || bad=/dev/null
: >suspect; : >lacking
awk -F '\t' '
  part == 1 {{ bad[$0] = 1; next }}
  part == 2 {{ known[$5] = $0; next }}
  part == 3 {{ if ($1 == "f") {{ size[$4] = $2 ""; time[$4] = $3 "" }} next }}
  $2 != "f" {{ next }}
  !($5 in size) || size[$5] != $3 "" {{ print $5 >"lacking"; next }}
  known[$5] != $0 || time[$5] != $4 "" || $5 in bad {{ print $5 >"suspect" }}' \
  part=1 "$bad" part=2 "$known" part=3 there part=4 {WANTED}
if test -s suspect; then
  (cd "$place" && lines <"$notes/suspect" | xargs -0 -r sha256sum -- 2>/dev/null) |
  awk -F '\t' '
    part == 1 {{ want[$5] = $1; next }}
    part == 2 {{ suspect[$0] = 1; next }}
    {{ path = substr($0, 69); if (substr($0, 1, 64) == want[path]) delete suspect[path] }}
    END {{ for (path in suspect) print path }}' part=1 {WANTED} part=2 suspect part=3 - >>lacking
fi
if ! test -f {MANIFEST}; then
  other=$(awk -F '\t' '
    part == 1 {{ lacking[$0] = 1; next }}
    part == 2 {{ want[$5] = $2 FS $6; next }}
    $1 != "d" && (want[$4] != $1 FS $5 || $4 in lacking) {{ print $4; exit }}' part=1 lacking part=2 {WANTED} part=3 there)
  if test -n "$other"; then
    no "$place/$other was not brought there, and would be lost: move it away, and converge again"; fi
fi
cd "$landing"
exec 7>{LOCK}
flock -n 7 || no "files of $name still arrive, by a run that was ended: wait for them, and converge again"
exec 7>&-
mkdir -p files; cd files
find . -type f -links +1 -exec rm -f {{}} +  # what took its place before a power cut
find . -type f -printf '%s\t%P\n' >"$notes/arrived"
awk -F '\t' 'part == 1 {{ keep[$0] = 1; next }} !($2 in keep) {{ print $2 }}' part=1 "$notes/lacking" part=2 "$notes/arrived" |
  lines | xargs -0 -r rm -f --
chown -R --reference="$landing" .
set -- $(awk -F '\t' '
  part == 1 {{ lacking[$0] = 1; next }}
  part == 2 {{ arrived[$2] = $1 ""; next }}
  $5 in lacking {{ need += $3 - arrived[$5]; if (arrived[$5] != $3 "") all += $3 }}
  END {{ printf "%.0f %.0f", need, all }}' part=1 "$notes/lacking" part=2 "$notes/arrived" part=3 "$notes/{WANTED}")
at=.; if test -d "$place"; then at=$place; fi  # it may be a disk of its own
free=$(df -Pk . "$at" | awk 'NR > 1 {{ if (NR == 2 || $4 < low) low = $4 }} END {{ printf "%.0f", low * 1024 }}')
lack=$(awk -v need="$1" -v room="$((free - keep))" 'BEGIN {{
  if (need > 0 && need > room) printf "needs %.1f MB more, and %.1f MB may be used", need / 1e6, (room > 0 ? room / 1e6 : 0) }}')
if test -n "$lack"; then
  if rmdir "$landing/files" 2>/dev/null; then rm -f "$landing/{LOCK}" "$landing/said" "$landing/said.err"; fi
  no "$name $lack at ${{place%/*}}: make room, or declare less storage.free"
fi
# With ./ before them: rsync takes a line that begins with # for a remark.
lines <"$notes/lacking" >"$notes/lacking0"
echo "$2 $(wc -l <"$notes/lacking")"
"""
"""Variables: name, place, notes, landing (the login user's folder), keep (bytes that stay free)."""

SETTLE = rf"""
{LIST}
# What arrived, where it has the right hashes, joins what $place has already, and is all that lies there.
umask 022; cd "$notes"
known={MANIFEST}; test -f "$known" || known=/dev/null
awk -F '\t' 'part == 1 {{ lacking[$0] = 1; next }} $5 in lacking {{ print $1 "  ./" $5 }}' part=1 lacking part=2 {WANTED} >sums
(cd "$landing/files" && sha256sum -c "$notes/sums" 2>/dev/null | damaged) >failed
if test -s failed; then
  (cd "$landing/files" && lines <"$notes/failed" | xargs -0 -r rm -f --)
  echo "damaged $(wc -l <failed) $(head -n 1 failed)" | clean; exit 0
fi
mkdir -p "$place"
(cd "$place" && list) >there
if grep -q "^u$tab" there; then
  echo "$place changed while it was looked at: converge again when nothing changes it" >&2; exit 1; fi
: >gone; : >aside
# Beside go files that others put there or edited, and all that would go where that is more than half:
# the origin's disk may not be mounted.
awk -F '\t' '
  part == 1 {{ known[$5] = $2 FS $3 FS $4 FS $6; if ($2 != "d") all++; next }}
  part == 2 {{ lacking[$0] = 1; next }}
  part == 3 {{ want[$5] = $2 FS $6; next }}
  $1 == "d" {{ next }}
  known[$4] == $1 FS $2 FS $3 FS $5 {{ if (want[$4] != $1 FS $5) gone[++n] = $4; next }}
  want[$4] != $1 FS $5 || $4 in lacking {{ print $4 >"aside" }}
  END {{ for (i = 1; i <= n; i++) print gone[i] >(2 * n > all ? "aside" : "gone") }}' \
  part=1 "$known" part=2 lacking part=3 {WANTED} part=4 there
if test -s aside; then
  mkdir -p -m 0700 "$strays"  # the folders that they come from may be closed to others
  to=$strays/$(date +%Y-%m-%dT%H%M%S)
  while IFS= read -r path; do
    case $path in */*) mkdir -p "$to/${{path%/*}}" ;; *) mkdir -p "$to" ;; esac
    mv -f "$place/$path" "$to/$path"
  done <aside
  echo "aside $(wc -l <aside) $to $(head -n 1 aside)" | clean
fi
if ! test -f {MANIFEST}; then
  # What lies there is Lockstep's from now on. Without hashes, and with no mode: it is not whole yet.
  awk -F '\t' -v OFS='\t' '{{ $1 = "-"; if ($5 == ".") $3 = "-"; print }}' {WANTED} >begun
  mv -f begun {MANIFEST}
fi
cd "$place"
lines <"$notes/gone" | xargs -0 -r rm -f --
awk -F '\t' 'part == 1 {{ if ($2 == "d") want[$5] = 1; next }} $1 == "d" && !($4 in want) {{ print $4 }}' \
  part=1 "$notes/{WANTED}" part=2 "$notes/there" | sort -r | lines | xargs -0 -r rmdir -- 2>/dev/null || :
awk -F '\t' '$2 == "d" {{ print $5 }}' "$notes/{WANTED}" | lines | xargs -0 -r mkdir -p --
chown -R 0:0 "$landing/files"
modes() {{
  for mode in $(awk -F '\t' '$2 == "d" {{ print $3 }}' "$notes/{WANTED}" | sort -u); do
    awk -F '\t' -v mode="$mode" '$2 == "d" && $3 == mode {{ print $5 }}' "$notes/{WANTED}" |
      lines | xargs -0 -r chmod "$(printf %05d "$mode")" --  # five digits: as they are, setgid too
  done
}}
modes
# Hard links: nothing is copied, where both lie on one file system.
cp -rlT --remove-destination "$landing/files" . 2>/dev/null ||
  cp -rT --preserve=mode,timestamps --remove-destination "$landing/files" .
awk -F '\t' '
  part == 1 {{ if ($1 == "f") time[$4] = $3 ""; next }}
  $2 == "f" && $5 in time && time[$5] != $4 "" {{ print $4 "\t" $5 }}' part=1 "$notes/there" part=2 "$notes/{WANTED}" |
while IFS="$tab" read -r time path; do touch -c -d "@$time" -- "./$path"; done
awk -F '\t' '
  part == 1 {{ if ($1 == "l") there[$4] = $5 ""; next }}
  $2 == "l" && there[$5] != $6 "" {{ print $5 "\t" $6 }}' part=1 "$notes/there" part=2 "$notes/{WANTED}" |
while IFS="$tab" read -r path to; do ln -sfnT -- "$to" "./$path"; done
modes
{settled(".")}
cd "$notes"; rm -rf "$landing"; mv -f {WANTED} {MANIFEST}
rm -f {DAMAGED} there suspect lacking lacking0 arrived sums failed gone aside progress said
"""
"""Variables: place, notes, landing, strays. Prints ``damaged NUMBER PATH`` and stops, where a hash is wrong, and
``aside NUMBER FOLDER PATH`` for what is moved away."""

DOUBTED = rf"""
printf '%s\n' "$path" >>"$notes/{DOUBT}"
"""
"""Variables: notes, path: its hash is not taken from the earlier manifest next time."""
