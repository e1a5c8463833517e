"""Throw-away nodes on this machine, which boot a full systemd and sshd: containers, or emulated machines.

They rehearse and test what a provisioner does to real servers: own addresses, ssh by key, a sudo user,
reboot, power cut, no internet. Containers (systemd-nspawn) share this machine's kernel, so kernel modules and
kernel NFS are outside of what they can show; machines (QEMU) have a kernel of their own, and are slow. This
package never configures a node; the roles do that.
"""
