"""Throw-away nodes on this machine: systemd-nspawn containers that boot a full systemd and sshd.

They rehearse and test what a provisioner does to real servers: own addresses, ssh by key, a sudo user,
reboot, power cut, no internet. They share this machine's kernel, so kernel modules, drivers and kernel
NFS are outside of what they can show. This package never configures a node; the roles do that.
"""
