//! What a protection gives for a drill, and when it takes that back.

use std::sync::{Arc, Weak};

use tokio_util::sync::CancellationToken;

use super::Driver;
use crate::backup::drill::Material;
use crate::backup::drill::snapshot::{CHUNK, Snapshot};
use crate::backup::error::CommandError;
use crate::link::GuestType;

/// A drill under way.
pub(super) struct Running {
    snapshot: Weak<Snapshot>,
    over: CancellationToken,
}

impl Driver {
    pub(super) fn drill_material(&mut self) -> Result<Material, CommandError> {
        let refused = |text: &str| Err(CommandError::Refused(text.into()));
        if self.drill.as_ref().is_some_and(|running| running.snapshot.strong_count() > 0) {
            return refused("a drill is reading the copy already");
        }
        let (domid, guest_type) = {
            let status = self.status.borrow();
            (status.domid, status.offer.guest_type)
        };
        if guest_type != GuestType::Pvh {
            // QEMU restores its state only with the devices that the state is of, and those have ways out.
            return refused(
                "only PVH guests can be drilled: an HVM guest's device model does not start without its devices",
            );
        }
        if !self.disks.is_empty() {
            // They are not those of one epoch but while a copy is activated, and what a guest does without its disks shows nothing.
            return refused(
                "the guest has disks that are replicated, and a drill has no disk to give: `remus disk status` says how they are; only a \
                 switchover shows that the guest goes on with them",
            );
        }
        let Some((epoch, state)) = self.machine.restorable() else {
            return refused(
                "there is no whole armed epoch to drill: the copy is not complete, or is being activated or given up",
            );
        };
        let state = state.to_vec();
        let (Some(domid), Some((config, preamble)), Some(feed)) = (domid, self.fed_head.clone(), &self.feed) else {
            return refused("the copy's domain is not there yet");
        };
        let snapshot = Arc::new(Snapshot::new(Arc::clone(&self.host), domid, CHUNK));
        let ready = feed.snapshot(&snapshot);
        let over = CancellationToken::new();
        self.drill = Some(Running { snapshot: Arc::downgrade(&snapshot), over: over.clone() });
        Ok(Material {
            name: self.whose.name.clone(),
            uuid: self.whose.uuid,
            config,
            preamble,
            state,
            epoch,
            domid,
            snapshot,
            ready,
            over,
        })
    }

    /// The copy is needed, or ends.
    pub(super) fn end_drill(&mut self) {
        if let Some(running) = self.drill.take() {
            running.over.cancel();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The protection's task has ended: nobody feeds the copy any more, and nobody guards it.
        self.over.cancel();
    }
}
