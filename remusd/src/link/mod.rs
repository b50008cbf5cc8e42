//! The link: one duplex byte stream per protection between the two remusd (DESIGN section 6).
//!
//! `frame` names what is said, `codec` turns it into bytes and back (sans-IO), `detector` decides when silence is suspicious
//! (sans-IO), `session` drives both over any stream, `primary` is the primary's end of it, `transport` makes the stream and
//! `bridge` joins ssh's standard streams to the backup's daemon. docs/protocol.md is the specification.

pub mod bridge;
pub mod child;
pub mod codec;
pub mod codes;
pub mod detector;
pub mod error;
pub mod frame;
pub mod handshake;
pub mod pages;
mod payload;
pub mod primary;
pub mod session;
pub mod tls;
pub mod token;
pub mod transport;
mod wire;

pub use error::{CloseReason, FrameError, LinkError};
pub use frame::{
    EpochEnd, ErrorCode, Frame, GuestState, GuestType, Heartbeat, Hello, LostReason, OnPrimaryLoss, ProtectOffer,
    Purpose, QueryEntry, RefuseCode, Role, StatePart, StopReason, VersionRange, Welcome,
};
pub use primary::{LinkEvent, LinkEvents, LinkSender, PrimaryLink};
pub use session::LinkOptions;
pub use token::{RecordKey, Token};
pub use transport::Transport;
