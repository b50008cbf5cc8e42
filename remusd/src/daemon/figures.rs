//! The daemon's figures for a monitoring system: what is counted as it happens, what is looked up when it is asked for, and the server.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::AbortHandle;

use super::Daemon;
use crate::metrics::{Now, server};
use crate::ops::Delivery;

impl Daemon {
    /// Counts events from now on, in a task of its own.
    pub fn count_events(self: &Arc<Self>) {
        let daemon = self.clone();
        let (_, mut live) = self.log.subscribe();
        tokio::spawn(async move {
            while let Some(delivery) = live.next().await {
                if let Delivery::Event(event) = delivery {
                    daemon.metrics.event(event.kind);
                }
            }
        });
    }

    /// All figures as OpenMetrics text.
    pub async fn figures(&self) -> String {
        let rows = self.rows(None).await.unwrap_or_default();
        let primaries = self.primaries.lock().await;
        let sent = primaries.values().map(|primary| {
            let sent = *primary.handle.sent.borrow();
            (primary.domain.name.clone(), sent.pages, sent.bytes)
        });
        let sent = sent.collect();
        drop(primaries);
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.metrics.text(&Now { rows, sent, wanted, witnesses: self.witnesses.health() })
    }
}

/// Where the figures are given away; nowhere at first.
#[derive(Default)]
pub struct Endpoint {
    serving: Mutex<Option<AbortHandle>>,
}

impl Endpoint {
    /// Gives them away at this address and no other from now on; `None`: nowhere. For use within the runtime.
    ///
    /// # Errors
    /// A sentence when the address cannot be listened at; then nowhere.
    pub fn set(&self, daemon: &Arc<Daemon>, address: Option<SocketAddr>) -> Result<(), String> {
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = serving.take() {
            old.abort();
        }
        let Some(address) = address else { return Ok(()) };
        let listener = server::listen(address).map_err(|error| format!("metrics.listen: {address}: {error}"))?;
        let daemon = daemon.clone();
        let task = tokio::spawn(server::serve(listener, move || {
            let daemon = daemon.clone();
            async move { daemon.figures().await }
        }));
        *serving = Some(task.abort_handle());
        Ok(())
    }
}
