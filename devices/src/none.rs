//! The subkind that takes a device and does nothing.

use async_trait::async_trait;

use crate::device::{Device, Ending, Kind};
use crate::error::DeviceError;
use crate::policy::Policy;
use crate::subkind::{Checkpointed, Match, Subkind};

/// Takes the devices a policy names, without holding back or mirroring anything. Put it before the subkinds it
/// is to override, for instance for an operator who wants no network buffering.
#[derive(Debug)]
pub struct NoOp {
    kind: Kind,
    takes: Policy,
}

impl NoOp {
    /// Takes the devices of `kind` that `takes` lets pass.
    #[must_use]
    pub fn new(kind: Kind, takes: Policy) -> Self {
        Self { kind, takes }
    }
}

#[async_trait]
impl Subkind for NoOp {
    fn name(&self) -> &'static str {
        "none"
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        Ok(match self.takes.lets_pass(device) {
            Some(_) => Match::Yes,
            None => Match::No,
        })
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        tracing::warn!(%device, "left alone on request: its output is not held back and it is not mirrored");
        Box::new(LeftAlone)
    }
}

struct LeftAlone;

#[async_trait]
impl Checkpointed for LeftAlone {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn teardown(&mut self, _ending: Ending) -> Result<(), DeviceError> {
        Ok(())
    }
}
