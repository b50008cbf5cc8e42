//! The vif gate of one copy (rule R9): closed before its domain is built, opened once this host owns it, right before GO.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::{Driver, Input};
use crate::gate;
use crate::ops::EventKind;
use crate::stream::handshake::GO;

impl Driver {
    /// Guards the domain on this host; returns its configuration with the gate in front of its vif scripts.
    pub(super) fn close_gate(&self, config: &str) -> Result<String, String> {
        let Some(list) = &self.settings.gate else { return Ok(config.to_owned()) };
        list.guard_copy(self.whose.uuid, &self.whose.name, config).map_err(|error| error.to_string())?;
        Ok(gate::config::with_gate(config, Path::exists))
    }

    /// We own the guest: its interfaces are opened; then `go`.
    pub(super) fn open_gate(&mut self) {
        let Some(list) = &self.settings.gate else { return self.go(Ok(())) };
        if let Err(error) = list.release(self.whose.uuid) {
            tracing::error!(domain = self.whose.name, "{error}");
        }
        let domid = self.status.borrow().domid;
        let (host, tell) = (Arc::clone(&self.host), self.tell.clone());
        tokio::spawn(async move {
            let opened = match domid {
                Some(domid) => host.open_vifs(domid).await.map_err(|error| error.to_string()),
                None => Err("its domain id is not known".into()),
            };
            let _ = tell.send(Input::GateOpen(opened));
        });
    }

    /// A guest that runs and is not seen is better than one that does not run: an operator can open it.
    pub(super) fn go(&mut self, opened: Result<(), String>) {
        if let Err(text) = opened {
            self.publish(
                EventKind::ActivationFailed,
                format!("{text}: if it is not reachable, `tc filter del dev VIF ingress pref 1` opens an interface"),
            );
        }
        self.feed(vec![Bytes::from_static(GO)]);
    }

    /// Nothing is left of the copy here, and nothing that would start it.
    pub(super) fn forget_gate(&self) {
        if let Some(list) = &self.settings.gate
            && let Err(error) = list.release_copy(self.whose.uuid)
        {
            tracing::error!(domain = self.whose.name, "{error}");
        }
    }
}
