"""Files that set variables for logins and launchers: the system's, and those in the homes of root and the login user.

For every role that looks for what somebody else sets on a node. Nothing here reads the files.
"""

from __future__ import annotations


def startup_files(user: str, *more: str) -> str:
    """Shell that makes the existing ones its arguments, $1 and on.

    user: whom SSH logs in as; $one and $two become the homes of root and of that user. more: further
    files of the system, as patterns of the shell.
    """
    return f"""
one=~root two=~{user}
set --
for each in /etc/environment /etc/profile /etc/profile.d/*.sh /etc/bash.bashrc /etc/bashrc {" ".join(more)}; do
  if test -f "$each"; then set -- "$@" "$each"; fi
done
for home in "$one" "$two"; do
  for each in .bashrc .bash_profile .bash_login .profile .zshrc .ssh/environment .nccl.conf .deepspeed_env; do
    if test -f "$home/$each"; then set -- "$@" "$home/$each"; fi
  done
  if test "$one" = "$two"; then break; fi
done
""".strip()
