//! The native engine: remusd reads the log of dirty pages and the guest's memory itself.
//!
//! A thread does the work and says what `libxl-save-helper` would say, so that whoever drives a capture need not know which engine it
//! is. The guest stands still only for: reading the log, copying the pages that it names with all cores into buffers that are there
//! already, and reading vCPU and platform state. Everything else (cutting, queueing, making buffers, looking for pages that the guest
//! has given back) happens while it runs. Pages that were dirtied early in an epoch are copied ahead while the guest runs, if they
//! have been seen to rest: then only the tail is copied while it stands still.

mod ahead;
mod batch;
mod worker;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::buffer::Shared;
use super::engine::{Engine, EngineCall};
use super::{CaptureBudget, CaptureError, CaptureStats, ItemReceiver};
use crate::ids::DomId;
use crate::stream::Record;
use crate::xen::XenError;
use crate::xen::foreign::Windows;
use worker::Worker;

/// A guest as the engine reads it. Lives on the engine's thread.
pub trait Source {
    /// libxc's image header, domain header and static records.
    ///
    /// # Errors
    /// Here and below: a call failed, or the domain is gone.
    fn preamble(&mut self) -> Result<Bytes, XenError>;

    /// Has writes logged from now on, with an empty log.
    ///
    /// # Errors
    /// [`XenError`].
    fn log_on(&mut self) -> Result<(), XenError>;

    /// Ends that.
    ///
    /// # Errors
    /// [`XenError`].
    fn log_off(&mut self) -> Result<(), XenError>;

    /// Maps all pages with contents anew.
    ///
    /// # Errors
    /// [`XenError`].
    fn map(&mut self) -> Result<(), XenError>;

    /// Whether a page may have come since the last [`map`](Self::map), so that a mapping may show what is no longer the guest's.
    ///
    /// # Errors
    /// [`XenError`].
    fn stale(&mut self) -> Result<bool, XenError>;

    /// Looks at all of the guest's memory: whether a page has contents that is not mapped, or the other way round. Only the answer
    /// for a suspended guest means anything.
    ///
    /// # Errors
    /// [`XenError`].
    fn differs(&mut self) -> Result<bool, XenError>;

    /// Looks through so many further windows of the guest's memory; whether a mapped page was found that the guest has given back.
    ///
    /// # Errors
    /// [`XenError`].
    fn given_back(&mut self, windows: usize) -> Result<bool, XenError>;

    /// Reads the log, a bit for each page, to `each`, and clears it. `last`: the guest is suspended, and what the hypervisor and other
    /// domains may still write to counts as dirty.
    ///
    /// # Errors
    /// [`XenError`].
    fn dirty(&mut self, last: bool, each: &mut dyn FnMut(&[u64])) -> Result<(), XenError>;

    /// The mapped memory.
    fn windows(&self) -> &Windows;

    /// TSC, vCPU and platform state, and parameters of the suspended guest, in the stream's order.
    ///
    /// # Errors
    /// [`XenError`].
    fn state(&mut self) -> Result<Vec<Record>, XenError>;
}

/// What to capture, and how.
#[derive(Clone, Copy, Debug)]
pub struct NativeConfig {
    /// The domain.
    pub domid: DomId,
    /// How much may be held in memory. The hard budget bounds an epoch, what is copied ahead included.
    pub budget: CaptureBudget,
    /// How long after the end of one epoch pages are copied ahead for the next; `None`: never.
    pub ahead_after: Option<Duration>,
}

impl NativeConfig {
    /// The defaults for a domain: nothing is copied ahead.
    #[must_use]
    pub fn new(domid: DomId) -> Self {
        Self { domid, budget: CaptureBudget::default(), ahead_after: None }
    }
}

/// The reply to [`EngineCall::Postcopy`] by which the epoch is given up: its dirty pages count as dirty again, and the engine asks to
/// suspend anew.
pub const AGAIN: i32 = 2;

/// A running native capture.
pub struct NativeEngine {
    domid: DomId,
    calls: mpsc::UnboundedReceiver<EngineCall>,
    replies: Sender<i32>,
    shared: Arc<Shared>,
    awaits_reply: bool,
    fault_told: bool,
}

impl NativeEngine {
    /// Opens the domain and begins to copy the running guest at once.
    ///
    /// # Errors
    /// [`CaptureError::Native`] when the domain or the interfaces cannot be opened.
    #[cfg(feature = "xen")]
    pub async fn spawn(config: NativeConfig) -> Result<(Self, ItemReceiver), CaptureError> {
        let domid = config.domid;
        Self::over(config, move || crate::xen::foreign::GuestSource::open(domid)).await
    }

    /// As [`spawn`](Self::spawn), with a source that `open` makes on the engine's thread.
    ///
    /// # Errors
    /// [`CaptureError::Native`] with the failure of `open`.
    pub async fn over<S, F>(config: NativeConfig, open: F) -> Result<(Self, ItemReceiver), CaptureError>
    where
        S: Source + 'static,
        F: FnOnce() -> Result<S, XenError> + Send + 'static,
    {
        let domid = config.domid;
        let fail = |cause: String| CaptureError::Native { domid, doing: "starting", cause };
        let shared = Shared::new(domid, config.budget);
        let (calls_tx, calls) = mpsc::unbounded_channel();
        let (replies, replies_rx) = channel();
        let (opened_tx, opened_rx) = tokio::sync::oneshot::channel();
        let inner = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(format!("capture-{domid}"))
            .spawn(move || match open() {
                Ok(source) => {
                    if opened_tx.send(Ok(())).is_ok() {
                        Worker::new(config, source, inner, calls_tx, replies_rx).run();
                    }
                }
                Err(error) => {
                    let _ = opened_tx.send(Err(error));
                }
            })
            .map_err(|error| fail(error.to_string()))?;
        match opened_rx.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(fail(error.to_string())),
            Err(_) => return Err(fail("its thread died".into())),
        }
        let items = ItemReceiver::new(Arc::clone(&shared));
        Ok((Self { domid, calls, replies, shared, awaits_reply: false, fault_told: false }, items))
    }
}

#[async_trait]
impl Engine for NativeEngine {
    async fn next_call(&mut self) -> Result<EngineCall, CaptureError> {
        let call = tokio::select! {
            biased;
            // First: what the thread says after a failure is only how it ends.
            error = self.shared.failed(), if !self.fault_told => {
                self.fault_told = true;
                return Err(error);
            }
            call = self.calls.recv() => call,
        };
        let call = call.unwrap_or_else(|| EngineCall::Exited("its thread panicked; see the log".into()));
        self.awaits_reply = call.wants_reply();
        Ok(call)
    }

    async fn reply(&mut self, value: i32) -> Result<(), CaptureError> {
        let domid = self.domid;
        if !self.awaits_reply {
            return Err(CaptureError::Protocol { domid, cause: format!("reply {value} to nothing") });
        }
        self.awaits_reply = false;
        self.replies.send(value).map_err(|_| CaptureError::Native {
            domid,
            doing: "answering it",
            cause: "its thread has ended".into(),
        })
    }

    /// Does nothing: pages are queued only while the guest runs, and the hard budget counts from the first.
    fn set_hard_mode(&self, _on: bool) {}

    fn discard(&self) {
        self.shared.discard();
    }

    fn stats(&self) -> CaptureStats {
        self.shared.stats()
    }

    fn stop_gently(&self) {
        self.shared.close();
    }

    /// Its thread ends at its next call, having turned log-dirty off.
    async fn kill(self: Box<Self>) {
        self.shared.close();
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

impl Drop for NativeEngine {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests;
