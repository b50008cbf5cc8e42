//! The device model (QEMU) of an HVM guest.
