//! What a driver sees of a capture engine.

use async_trait::async_trait;

use super::{CaptureError, CaptureStats};

/// What an engine says, in the words of `libxl-save-helper`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineCall {
    /// Suspend the guest. Reply 1 when it is suspended, 0 to end the capture.
    Suspend,
    /// The epoch is copied: resume the guest. Reply 1 to go on, 0 to end the capture.
    Postcopy,
    /// Between two epochs. Reply 1 to begin the next one, 0 to end the capture.
    Checkpoint,
    /// Have the device model log what it writes to guest memory, or stop that. Reply 0 when done, -1 on failure; 0 at once for a
    /// guest without device model.
    SwitchQemuLogdirty {
        /// On or off.
        enable: bool,
    },
    /// How far a pass over memory is; no reply.
    Progress {
        /// Which pass.
        what: String,
        /// Pages done.
        done: u64,
        /// Pages in all.
        total: u64,
    },
    /// A line for the log; no reply.
    Log {
        /// `xentoollog_level`: 1 debug, 2 verbose, 3 detail, 4 progress, 5 info, 6 notice, 7 warn, 8 error, 9 critical.
        level: u32,
        /// The line.
        text: String,
    },
    /// The capture has ended. Reply 0, and the engine exits.
    Complete {
        /// What `xc_domain_save` returned: 0 also when a callback ended it.
        retval: i32,
        /// Its errno.
        errno: i32,
    },
    /// The engine has ended; nothing more will come. Empty when it ended well, else how.
    Exited(String),
}

impl EngineCall {
    /// Whether the engine waits for a reply.
    #[must_use]
    pub fn wants_reply(&self) -> bool {
        matches!(
            self,
            Self::Suspend | Self::Postcopy | Self::Checkpoint | Self::SwitchQemuLogdirty { .. } | Self::Complete { .. }
        )
    }
}

/// A running capture of one domain. It tells by calls what is to be done to the guest, and yields the epochs through the
/// [`ItemReceiver`](super::ItemReceiver) that it was started with. Dropping it ends it at once; see [`kill`](Self::kill) for what that
/// leaves.
#[async_trait]
pub trait Engine: Send {
    /// What the engine says next. Calls that want a reply need one before anything else will come. Cancel-safe.
    ///
    /// # Errors
    /// [`CaptureError`] once, as soon as the capture fails: resume the guest, then stop the engine; its further calls still come.
    async fn next_call(&mut self) -> Result<EngineCall, CaptureError>;

    /// Answers the last call.
    ///
    /// # Errors
    /// [`CaptureError::Protocol`] when no call waits for a reply, [`CaptureError::Io`] when the engine is gone.
    async fn reply(&mut self, value: i32) -> Result<(), CaptureError>;

    /// While on, captured items are queued without waiting for the receiver, up to the hard budget. Set it when the guest is to be
    /// suspended, clear it when it runs. Never blocks.
    fn set_hard_mode(&self, on: bool);

    /// Throws away what is still to come, so that the engine does not wait for a receiver.
    fn discard(&self);

    /// Counts since the start.
    fn stats(&self) -> CaptureStats;

    /// Has the engine end its capture: it turns log-dirty off and says [`EngineCall::Complete`]. A call of it that waits, or still
    /// comes, is to be answered with 0 (as always, for `SwitchQemuLogdirty`, with whether it was done). Go on until
    /// [`EngineCall::Exited`]. Does not resume the guest. Never blocks.
    fn stop_gently(&self);

    /// Ends the engine at once. Log-dirty may stay on, and the guest as it is: see to both.
    async fn kill(self: Box<Self>);

    /// Its process, if it has one of its own and that has not been reaped.
    fn pid(&self) -> Option<u32>;
}
