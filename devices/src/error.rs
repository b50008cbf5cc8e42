//! What can go wrong with devices.

use std::fmt;

use crate::device::Device;

/// Any error of a subkind, with its own words.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Something failed, on one device or in one subkind.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A subkind could not start, before any device was looked at.
    #[error("{subkind}: cannot start: {source}")]
    Init {
        /// The subkind's name.
        subkind: &'static str,
        /// Its reason.
        source: BoxError,
    },
    /// No subkind takes this device and policy does not let it pass.
    #[error("{device}: nothing here can keep it in step with a backup ({tried}); {advice}")]
    NotTaken {
        /// The device, with its names.
        device: String,
        /// Which subkinds were asked.
        tried: String,
        /// What the operator can do.
        advice: String,
    },
    /// A subkind failed on a device.
    #[error("{device}: {doing}: {source}")]
    Failed {
        /// The device, with its names.
        device: String,
        /// The operation: `set up`, `close epoch 7`.
        doing: String,
        /// The reason.
        source: BoxError,
    },
    /// The set is not in a state for this operation: not set up, or its set-up failed, or already torn down.
    #[error("the devices cannot {doing}: {why}")]
    NotReady {
        /// The operation asked for.
        doing: &'static str,
        /// The state it is in.
        why: &'static str,
    },
}

impl DeviceError {
    /// A subkind that cannot start.
    pub fn init(subkind: &'static str, source: impl Into<BoxError>) -> Self {
        Self::Init { subkind, source: source.into() }
    }

    /// A failure of `doing` on `device`.
    pub fn failed(device: &Device, doing: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Failed { device: device.to_string(), doing: doing.into(), source: source.into() }
    }
}

/// A set operation failed. The cause is the error that came first; nothing that failed later hides it.
#[derive(Debug)]
pub struct SetError {
    /// The first error.
    pub cause: DeviceError,
    /// What failed on other devices at the same time.
    pub others: Vec<DeviceError>,
    /// What failed while cleaning up after `cause`.
    pub teardown: Vec<DeviceError>,
}

impl SetError {
    /// `errors` in the order they happened; `None` when there are none.
    pub(crate) fn from_errors(errors: Vec<DeviceError>) -> Option<Self> {
        let mut errors = errors.into_iter();
        Some(Self { cause: errors.next()?, others: errors.collect(), teardown: Vec::new() })
    }
}

impl fmt::Display for SetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        for e in &self.others {
            write!(f, "; also {e}")?;
        }
        for e in &self.teardown {
            write!(f, "; and cleaning up, {e}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SetError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}
