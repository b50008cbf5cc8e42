//! A whole stream as xl sends it: xl's head, the libxl stream, and the libxc stream inside, plain or Remus.
//!
//! The hand-over from libxc to libxl is implicit: after libxc's CHECKPOINT come libxl records up to CHECKPOINT_END, then libxc
//! records again; after libxc's END come libxl records up to END (facts of libxl_stream_read.c of Xen 4.17).

use bytes::{Buf, Bytes};

use super::error::StreamError;
use super::item::{CaptureItem, Layer, Record};
use super::libxc::{LibxcEvent, LibxcParser, padding};
use super::pull::Pull;
use super::{libxl, save_file};

/// What the parser yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// The domain's configuration, JSON; first.
    Config(String),
    /// A piece of an epoch. `EndOfEpoch` means that the device model's state is complete too.
    Item(CaptureItem),
    /// The end of a plain stream.
    End,
}

#[derive(Clone, Copy, Debug)]
enum State {
    XlHeader,
    XlOptional(usize),
    LibxlHeader,
    LibxlHead,
    LibxlBody { kind: u32, length: usize },
    Libxc,
    Ended,
}

/// Which libxl records may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before the inner stream.
    Opening,
    /// After libxc's CHECKPOINT.
    Checkpoint,
    /// After libxc's END.
    Closing,
}

/// Parses what a stock `xl remus` or `xl migrate` sends after the receiver's banner.
#[derive(Debug)]
pub struct SessionParser {
    state: State,
    phase: Phase,
    libxc: LibxcParser,
    events: Vec<LibxcEvent>,
    epochs: u64,
}

impl Default for SessionParser {
    fn default() -> Self {
        Self::new()
    }
}

impl SessionParser {
    /// A parser that expects xl's header.
    #[must_use]
    pub fn new() -> Self {
        Self { state: State::XlHeader, phase: Phase::Opening, libxc: LibxcParser::new(), events: Vec::new(), epochs: 0 }
    }

    fn libxl_head(&mut self, mut head: Bytes, out: &mut Vec<SessionEvent>) -> Result<(), StreamError> {
        let kind = head.get_u32_le();
        let length = head.get_u32_le() as usize;
        if length > libxl::RECORD_MAX {
            return Err(StreamError::TooLong {
                layer: Layer::Libxl,
                kind,
                length: length as u64,
                limit: libxl::RECORD_MAX as u64,
            });
        }
        let fits = match self.phase {
            Phase::Opening => kind == libxl::kind::LIBXC_CONTEXT,
            Phase::Checkpoint => matches!(
                kind,
                libxl::kind::EMULATOR_XENSTORE_DATA | libxl::kind::EMULATOR_CONTEXT | libxl::kind::CHECKPOINT_END
            ),
            Phase::Closing => {
                matches!(kind, libxl::kind::EMULATOR_XENSTORE_DATA | libxl::kind::EMULATOR_CONTEXT | libxl::kind::END)
            }
        };
        if !fits {
            return Err(if kind <= libxl::kind::CHECKPOINT_END {
                StreamError::Misplaced {
                    layer: Layer::Libxl,
                    kind,
                    place: match self.phase {
                        Phase::Opening => "comes before the libxc stream",
                        Phase::Checkpoint => "comes within a checkpoint",
                        Phase::Closing => "comes after the libxc stream",
                    },
                }
            } else {
                StreamError::Unknown { layer: Layer::Libxl, kind }
            });
        }
        if length == 0 {
            self.state = State::LibxlHead;
            return self.libxl_record(kind, Bytes::new(), out);
        }
        self.state = State::LibxlBody { kind, length };
        Ok(())
    }

    fn libxl_record(&mut self, kind: u32, body: Bytes, out: &mut Vec<SessionEvent>) -> Result<(), StreamError> {
        match kind {
            libxl::kind::EMULATOR_XENSTORE_DATA | libxl::kind::EMULATOR_CONTEXT => {
                libxl::check_emulator(kind, &body)?;
                out.push(SessionEvent::Item(CaptureItem::State(Record { layer: Layer::Libxl, kind, body })));
            }
            _ if !body.is_empty() => {
                return Err(StreamError::Malformed {
                    layer: Layer::Libxl,
                    kind,
                    reason: format!("{} bytes, must be empty", body.len()),
                });
            }
            libxl::kind::LIBXC_CONTEXT => self.state = State::Libxc,
            libxl::kind::CHECKPOINT_END => {
                self.state = State::Libxc;
                self.epochs += 1;
                out.push(SessionEvent::Item(CaptureItem::EndOfEpoch));
            }
            _ => {
                self.state = State::Ended;
                out.push(SessionEvent::End);
            }
        }
        Ok(())
    }

    fn libxc(&mut self, bytes: Bytes, out: &mut Vec<SessionEvent>) -> Result<(), StreamError> {
        self.libxc.take(bytes, &mut self.events)?;
        for event in self.events.drain(..) {
            match event {
                LibxcEvent::Item(CaptureItem::EndOfEpoch) => {
                    self.state = State::LibxlHead;
                    self.phase = Phase::Checkpoint;
                }
                LibxcEvent::Item(item) => out.push(SessionEvent::Item(item)),
                LibxcEvent::End => {
                    self.state = State::LibxlHead;
                    self.phase = Phase::Closing;
                }
            }
        }
        Ok(())
    }
}

impl Pull for SessionParser {
    type Out = SessionEvent;

    fn need(&self) -> usize {
        match self.state {
            State::XlHeader => save_file::HEADER,
            State::XlOptional(length) => length,
            State::LibxlHeader => libxl::HEADER,
            State::LibxlHead => 8,
            State::LibxlBody { length, .. } => length + padding(length),
            State::Libxc => self.libxc.need(),
            State::Ended => 0,
        }
    }

    fn take(&mut self, mut bytes: Bytes, out: &mut Vec<SessionEvent>) -> Result<(), StreamError> {
        if bytes.len() != self.need() {
            return Err(StreamError::Truncated { within: "a piece of the stream" });
        }
        match self.state {
            State::XlHeader => {
                let length = save_file::check_header(&bytes)?;
                if length == 0 {
                    return Err(StreamError::Config("it is missing".into()));
                }
                self.state = State::XlOptional(length);
                Ok(())
            }
            State::XlOptional(_) => {
                out.push(SessionEvent::Config(save_file::config(&bytes)?));
                self.state = State::LibxlHeader;
                Ok(())
            }
            State::LibxlHeader => {
                libxl::check_header(&bytes)?;
                self.state = State::LibxlHead;
                Ok(())
            }
            State::LibxlHead => self.libxl_head(bytes, out),
            State::LibxlBody { kind, length } => {
                self.state = State::LibxlHead;
                bytes.truncate(length);
                self.libxl_record(kind, bytes, out)
            }
            State::Libxc => self.libxc(bytes, out),
            State::Ended => Ok(()),
        }
    }

    fn within(&self) -> Option<&'static str> {
        match self.state {
            State::XlHeader | State::XlOptional(_) => Some("xl's header"),
            State::LibxlHeader => Some("the libxl header"),
            State::LibxlHead if self.phase == Phase::Checkpoint => Some("a checkpoint"),
            State::LibxlHead => Some("the libxl stream (the last record is whole)"),
            State::LibxlBody { .. } => Some("a libxl record"),
            State::Libxc => self.libxc.within(),
            State::Ended => None,
        }
    }
}
