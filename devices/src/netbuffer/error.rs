//! What can go wrong with the kernel's queues, in words an operator can act on.

use std::io;

use super::plug_state::OutOfTurn;

/// A failure of network buffering.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel does not have a module, and loading it has not helped.
    #[error("the kernel lacks {module}: modprobe {module}")]
    MissingModule {
        /// The module's name.
        module: &'static str,
    },
    /// The kernel refused a request and changed nothing.
    #[error("{link}: cannot {doing}: {reason}")]
    Refused {
        /// The interface.
        link: String,
        /// What was asked for.
        doing: &'static str,
        /// The error number, positive.
        errno: i32,
        /// The kernel's own words, or the error number's.
        reason: String,
    },
    /// Talking to the kernel failed. Whether a request was done is not known.
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
    /// The kernel's answer did not come in time.
    #[error("{doing}: no answer from the kernel within {ms} ms (is another process holding the RTNL lock?)")]
    Timeout {
        /// What was asked for.
        doing: &'static str,
        /// How long it was waited for, in milliseconds.
        ms: u128,
    },
    /// There is no interface of this name.
    #[error("there is no network interface {0}")]
    NoLink(String),
    /// A name is too long for an interface.
    #[error("{0}: an interface name has at most 15 characters")]
    Name(String),
    /// An earlier run has left its queue behind.
    #[error("{ifb} exists already, left by an earlier protection: `remus recover` removes it")]
    Leftover {
        /// The intermediate device.
        ifb: String,
    },
    /// Somebody else uses the place where our filter has to be.
    #[error(
        "{link}: somebody else has an ingress filter with preference {preference}; remove it (tc filter show dev {link} ingress)"
    )]
    ForeignFilter {
        /// The interface.
        link: String,
        /// The filter's preference.
        preference: u16,
    },
    /// A packet socket that notices output could not be opened.
    #[error("{vif}: cannot watch for output, which `--interval auto` needs: {cause}; protect with a fixed interval")]
    Tap {
        /// The guest's interface.
        vif: String,
        /// Why.
        cause: io::Error,
    },
    /// The order of requests to a plug was broken by the caller.
    #[error(transparent)]
    OutOfTurn(#[from] OutOfTurn),
    /// Held output had not all left the queue when it was removed.
    #[error("{ifb}: {packets} packets had not left after {ms} ms and are lost")]
    NotDrained {
        /// The intermediate device.
        ifb: String,
        /// How many.
        packets: u64,
        /// How long it was waited for, in milliseconds.
        ms: u128,
    },
    /// A set-up script failed.
    #[error("{script} {doing} for {vif}: {said}")]
    Script {
        /// The script's path.
        script: String,
        /// `setup` or `teardown`.
        doing: &'static str,
        /// The guest's interface.
        vif: String,
        /// What it said, or how it ended.
        said: String,
    },
    /// A set-up script named something that is no intermediate device.
    #[error("{0}, which the set-up script named, is no ifb device")]
    NotIfb(String),
    /// xenstore, where a set-up script leaves its answer, could not be read.
    #[error("cannot read the set-up script's answer: {0}")]
    Store(String),
    /// The handle is not set up, or torn down.
    #[error("{0} is not buffered (not set up, or torn down)")]
    NotSetUp(String),
    /// An earlier request was not answered in time: nothing is sent any more.
    #[error("given up after an earlier request was not answered in time")]
    GivenUp,
    /// The thread that talks to the kernel is gone.
    #[error("the netlink thread is not running")]
    NoWorker,
}

impl NetError {
    /// The kernel's error number, when it refused.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            NetError::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// A refusal with this number means that `module` is missing.
    pub(super) fn missing_if(self, number: i32, module: &'static str) -> Self {
        if self.errno() == Some(number) { NetError::MissingModule { module } } else { self }
    }
}
