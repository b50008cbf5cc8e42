//! The device model of an HVM guest, as the driver needs it.

use async_trait::async_trait;

use crate::stream::Record;

/// The device model failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The device model (QEMU) of the guest: {0}")]
pub struct ModelError(pub String);

/// A guest's device model. Every call is bounded in time: the guest stands still meanwhile.
#[async_trait]
pub trait DeviceModel: Send {
    /// Stops the device model and takes its state as libxl's records (`EMULATOR_XENSTORE_DATA`, `EMULATOR_CONTEXT`).
    async fn stop_and_save(&mut self) -> Result<Vec<Record>, ModelError>;
    /// Lets it go on; harmless when it runs.
    async fn go_on(&mut self) -> Result<(), ModelError>;
    /// Makes it log the guest's pages that it writes, or ends that.
    async fn log_dirty(&mut self, enable: bool) -> Result<(), ModelError>;
}
