//! The device model (QEMU) of an HVM guest: its clock stops with the guest, and its state is part of every epoch.

mod model;
mod qmp;

pub use model::DeviceModel;
pub use qmp::{Qmp, QmpError, socket_path};

#[cfg(test)]
mod tests;
