"""What libvirt, and what manages it, has to be told so that domains migrate into shards.

``hook``     libvirt's hook and KubeVirt's: our emulator goes into domains that a rule chooses
``install``  where the hook stands
"""
