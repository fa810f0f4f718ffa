"""What libvirt, and what manages it, has to be told so that domains migrate into shards.

``hook``     libvirt's hook and KubeVirt's: our emulator goes into domains that a rule chooses
``install``  where the hook stands
``findings`` what this host lacks, with the remedy: `sharded-pc check --libvirt`
``confined`` the ordinary check as libvirt's QEMUs are; how they are says ``qemu_conf``
"""
