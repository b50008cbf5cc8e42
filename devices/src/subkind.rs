//! What a way of handling devices has to provide.
//!
//! The division of work is that of libxl's checkpoint device layer (Xen's `libxl_checkpoint_device.c`), with
//! `matches` apart from `setup` and with an explicit `arm` and `Ending`.

use async_trait::async_trait;

use crate::device::{Device, DeviceStats, Ending, EpochContext, Kind};
use crate::error::DeviceError;

/// A subkind's answer about a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// It takes the device.
    Yes,
    /// It does not: ask the next subkind.
    No,
}

/// One way of handling devices of one kind.
#[async_trait]
pub trait Subkind: Send + Sync {
    /// Its name, for messages and records.
    fn name(&self) -> &'static str;

    /// The kind of device it is asked about.
    fn kind(&self) -> Kind;

    /// Called once per protection, before anything else of this subkind. May block for as long as it takes to
    /// load a kernel module.
    ///
    /// # Errors
    /// Whatever keeps the subkind from working at all; the protection is then refused.
    fn init(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Called once after the last device is torn down, if `init` succeeded. Cannot fail, does not wait.
    fn cleanup(&self) {}

    /// Whether this subkind takes `device`.
    ///
    /// # Errors
    /// When it cannot tell. That ends the set-up: it is not a `No`.
    async fn matches(&self, device: &Device) -> Result<Match, DeviceError>;

    /// A handle for a device that matched. Touches nothing yet: that is `setup`'s work.
    fn attach(&self, device: &Device) -> Box<dyn Checkpointed>;
}

/// One device in the care of a subkind.
#[async_trait]
pub trait Checkpointed: Send {
    /// Prepares the device. Output still flows.
    ///
    /// # Errors
    /// The whole set-up fails; `teardown` is called also then.
    async fn setup(&mut self) -> Result<(), DeviceError>;

    /// Ends the care. Called also when `setup` failed or never ran, and safe to call twice.
    ///
    /// # Errors
    /// What could not be undone. A failed `Discard` must leave the device closed rather than open.
    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError>;

    /// Whether it could be armed now: nothing is left to be synchronised. Output still flows.
    async fn is_ready(&mut self) -> bool {
        true
    }

    /// From here on output is held. Called just before the first armed epoch's suspend, the guest running.
    ///
    /// # Errors
    /// Nothing is armed; the epoch must not be declared armed.
    async fn arm(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The guest is suspended: what it sent or wrote so far belongs to this epoch. Must not wait for a peer, a
    /// disk or a script.
    ///
    /// # Errors
    /// The epoch must be abandoned.
    async fn postsuspend(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The state is captured and the guest about to run again. Must not wait either.
    ///
    /// # Errors
    /// The epoch must be abandoned.
    async fn preresume(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The guest runs again, and the backup has not been told that the epoch is whole: wait for what this device's own replication needs
    /// on the other host. Bounded: nothing else of the protection goes on meanwhile.
    ///
    /// # Errors
    /// The epoch is not declared whole, and the protection ends.
    async fn confirm(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The backup has acknowledged the epoch: let go what was held for it.
    ///
    /// # Errors
    /// What is held stays held. The device refuses further epochs: tear it down or give up the protection.
    async fn commit(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The epoch, for which `postsuspend` was called, will never be acknowledged. What was held for it is held
    /// on, for a later epoch to cover.
    ///
    /// # Errors
    /// As for `commit`.
    async fn abandon(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What is held and lost, as last seen. Does not block.
    fn stats(&self) -> DeviceStats {
        DeviceStats::default()
    }

    /// What a recovery after a crash of this process needs to know to undo `setup`.
    fn record(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}
