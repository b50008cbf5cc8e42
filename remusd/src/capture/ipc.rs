//! The messages between libxl and `libxl-save-helper` (tools/libs/light/libxl_save_msgs_gen.pl, the same from Xen 4.14 to 4.22).
//!
//! Helper to us: `u16` length, `u16` message number, arguments packed in native byte order; a string is a `u32` length that counts
//! its NUL, and its bytes. Us to helper: a bare `i32` for each message that wants a reply.

use std::process::ExitStatus;

use bytes::{Buf, Bytes, BytesMut};

/// Message numbers; the callbacks' numbers are also the bits of the helper's `cbflags` argument.
mod number {
    pub(super) const LOG: u16 = 1;
    pub(super) const PROGRESS: u16 = 2;
    pub(super) const SUSPEND: u16 = 3;
    pub(super) const POSTCOPY: u16 = 4;
    pub(super) const CHECKPOINT: u16 = 5;
    pub(super) const SWITCH_QEMU_LOGDIRTY: u16 = 7;
    pub(super) const COMPLETE: u16 = 10;
}

/// The callbacks that a Remus save needs: suspend, postcopy, checkpoint, switch_qemu_logdirty.
pub(super) const CALLBACK_FLAGS: u32 =
    1 << number::SUSPEND | 1 << number::POSTCOPY | 1 << number::CHECKPOINT | 1 << number::SWITCH_QEMU_LOGDIRTY;

/// What the save helper says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelperCall {
    /// Suspend the guest. Reply 1 when it is suspended, 0 to end the capture.
    Suspend,
    /// The epoch is copied, all of it is in the pipe: resume the guest. Reply 1 to go on, 0 to end the capture.
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
    /// The capture has ended. Reply 0, and the helper exits.
    Complete {
        /// What `xc_domain_save` returned: 0 also when a callback ended it.
        retval: i32,
        /// Its errno.
        errno: i32,
    },
    /// The helper process has ended; nothing more will come.
    Exited(ExitStatus),
}

impl HelperCall {
    /// Whether the helper waits for a reply.
    #[must_use]
    pub fn wants_reply(&self) -> bool {
        matches!(
            self,
            Self::Suspend | Self::Postcopy | Self::Checkpoint | Self::SwitchQemuLogdirty { .. } | Self::Complete { .. }
        )
    }
}

/// Takes the first message off `buffer`; `None` if it is not complete yet.
///
/// # Errors
/// A sentence about a message that is not as it must be.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<HelperCall>, String> {
    let Some(&[low, high]) = buffer.first_chunk::<2>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_ne_bytes([low, high]));
    if buffer.len() < 2 + length {
        return Ok(None);
    }
    buffer.advance(2);
    let mut body = buffer.split_to(length).freeze();
    let call = message(&mut body)?;
    if body.is_empty() { Ok(Some(call)) } else { Err(format!("{} bytes too many after {call:?}", body.len())) }
}

fn message(body: &mut Bytes) -> Result<HelperCall, String> {
    let short = |_| "a message is too short".to_owned();
    Ok(match body.try_get_u16_ne().map_err(short)? {
        number::LOG => {
            let level = body.try_get_u32_ne().map_err(short)?;
            // Two's complement: the helper sends an int.
            let errno = body.try_get_u32_ne().map_err(short)?.cast_signed();
            let context = string(body)?;
            let text = string(body)?;
            let mut line = format!("{context}: {text}");
            if errno > 0 {
                let cause = std::io::Error::from_raw_os_error(errno);
                line = format!("{line}: {cause}");
            }
            HelperCall::Log { level, text: line }
        }
        number::PROGRESS => {
            let context = string(body)?;
            let doing = string(body)?;
            HelperCall::Progress {
                what: if doing.is_empty() { context } else { doing },
                done: body.try_get_u64_ne().map_err(short)?,
                total: body.try_get_u64_ne().map_err(short)?,
            }
        }
        number::SUSPEND => HelperCall::Suspend,
        number::POSTCOPY => HelperCall::Postcopy,
        number::CHECKPOINT => HelperCall::Checkpoint,
        number::SWITCH_QEMU_LOGDIRTY => {
            body.try_get_u32_ne().map_err(short)?;
            HelperCall::SwitchQemuLogdirty { enable: body.try_get_u32_ne().map_err(short)? != 0 }
        }
        number::COMPLETE => HelperCall::Complete {
            retval: body.try_get_i32_ne().map_err(short)?,
            errno: body.try_get_i32_ne().map_err(short)?,
        },
        other => return Err(format!("unknown message {other}")),
    })
}

fn string(body: &mut Bytes) -> Result<String, String> {
    let length = body.try_get_u32_ne().map_err(|_| "a string's length is missing".to_owned())? as usize;
    if length == 0 {
        // A null pointer in the helper.
        return Ok(String::new());
    }
    if length > body.len() {
        return Err(format!("a string of {length} bytes in {}", body.len()));
    }
    let bytes = body.split_to(length);
    let text = bytes.strip_suffix(&[0]).ok_or_else(|| "a string without its NUL".to_owned())?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The first bytes of Debian's libxl-save-helper 4.17.7 on a machine without Xen.
    const REAL: &[u8] = b"\x32\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x12\x00\x00\x00libxl-save-helper\x00\x0e\x00\x00\x00starting save\x00";

    #[test]
    fn decodes_the_real_helpers_first_message() {
        let mut buffer = BytesMut::from(REAL);
        assert_eq!(
            decode(&mut buffer).unwrap(),
            Some(HelperCall::Log { level: 1, text: "libxl-save-helper: starting save".into() })
        );
        assert!(buffer.is_empty());
    }

    #[test]
    fn waits_for_a_whole_message() {
        for cut in 0..REAL.len() {
            let mut buffer = BytesMut::from(&REAL[..cut]);
            assert_eq!(decode(&mut buffer).unwrap(), None);
            assert_eq!(buffer.len(), cut, "nothing was consumed");
        }
    }

    #[test]
    fn decodes_calls() {
        let bytes = b"\x02\x00\x03\x00\x02\x00\x04\x00\x02\x00\x05\x00\
            \x0a\x00\x07\x00\x05\x00\x00\x00\x01\x00\x00\x00\
            \x0a\x00\x0a\x00\xff\xff\xff\xff\x16\x00\x00\x00";
        let mut buffer = BytesMut::from(&bytes[..]);
        let mut calls = Vec::new();
        while let Some(call) = decode(&mut buffer).unwrap() {
            calls.push(call);
        }
        assert_eq!(
            calls,
            [
                HelperCall::Suspend,
                HelperCall::Postcopy,
                HelperCall::Checkpoint,
                HelperCall::SwitchQemuLogdirty { enable: true },
                HelperCall::Complete { retval: -1, errno: 22 }
            ]
        );
        assert!(calls.iter().all(HelperCall::wants_reply));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        for bytes in [
            &b"\x00\x00"[..],
            b"\x02\x00\x63\x00",
            b"\x03\x00\x03\x00\x00",
            b"\x06\x00\x02\x00\xff\xff\xff\x7f",
            b"\x07\x00\x02\x00\x01\x00\x00\x00x",
        ] {
            assert!(decode(&mut BytesMut::from(bytes)).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn the_flags_are_those_of_libxl() {
        assert_eq!(CALLBACK_FLAGS, 184);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer) {}
        }
    }
}
