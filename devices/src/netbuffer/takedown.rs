//! Taking a buffered interface apart, by names alone, so that it works after a crash and twice. Blocking.

use std::time::{Duration, Instant};

use crate::device::Ending;

use super::conn::Conn;
use super::error::NetError;
use super::messages::PLUG;
use super::ops::On;
use super::plug_model::PlugOp;
use super::wire::Link;

/// The shortest and longest pause between two looks at a queue that drains; there is no event for that.
const PAUSES: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(20));

/// The handle of the empty plug that a script's device gets at the end: no lane's.
const LAST_MAJOR: u16 = 0x5300;

/// What becomes of the intermediate device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IfbFate {
    /// It is ours and goes.
    Remove,
    /// A script made it, leads the interface there, and takes both back afterwards: it stays, open or empty.
    Keep,
}

/// Ends the buffering of `vif` through `ifb`. Either may be gone already. `patience` bounds each of the two
/// waits for held output to leave.
///
/// # Errors
/// The first step that failed. A failed `Discard` leaves the buffer closed. Held output that did not leave in
/// time is lost and reported, after everything is put back.
pub(super) fn take_down(
    conn: &mut Conn,
    vif: &str,
    ifb: &str,
    ending: Ending,
    patience: Duration,
    fate: IfbFate,
) -> Result<(), NetError> {
    let vif_link = conn.link(vif)?;
    let on_vif = vif_link.as_ref().map(|link| On { name: vif, index: link.index });
    let ifb_link = conn.link(ifb)?.filter(|link| link.kind == "ifb");
    let on_ifb = ifb_link.as_ref().map(|link| On { name: ifb, index: link.index });
    match ending {
        Ending::Hold => Ok(()),
        Ending::Discard => {
            // Sealed first, so that there is no moment in which output is neither dropped nor held.
            if let Some(vif) = on_vif {
                conn.add_seal(vif)?;
                conn.remove_redirect(vif)?;
            }
            match (on_ifb, fate) {
                (Some(ifb), IfbFate::Remove) => conn.delete_link(ifb),
                // What was held goes with the old plug; the script finds one there as it had left it.
                (Some(ifb), IfbFate::Keep) => conn.put_plug(ifb, LAST_MAJOR, u32::MAX),
                (None, _) => Ok(()),
            }
        }
        Ending::Release => {
            let mut left = 0;
            if let Some(ifb) = on_ifb {
                let redirected = match on_vif {
                    Some(vif) => conn.filters(vif)?.iter().any(|f| f.to == ifb.index),
                    None => false,
                };
                if redirected {
                    let_all_flow(conn, ifb)?;
                    // Most of it leaves in order before anything can overtake it ..
                    wait_until_empty(conn, ifb, patience)?;
                }
            }
            if let Some(vif) = on_vif {
                conn.remove_redirect(vif)?;
            }
            if let Some(ifb) = on_ifb.filter(|_| fate == IfbFate::Remove) {
                // .. and nothing comes in any more while the rest does.
                left = wait_until_empty(conn, ifb, patience)?;
                conn.delete_link(ifb)?;
            }
            if let Some(vif) = on_vif {
                conn.remove_idle_ingress(vif)?;
            }
            if left > 0 {
                return Err(NetError::NotDrained { ifb: ifb.to_owned(), packets: left, ms: patience.as_millis() });
            }
            Ok(())
        }
    }
}

/// Opens the plug for good. A qdisc that is not a plug holds nothing back.
fn let_all_flow(conn: &mut Conn, ifb: On<'_>) -> Result<(), NetError> {
    match conn.root_qdisc(ifb)? {
        Some(plug) if plug.kind == PLUG => conn.change_plug(ifb, plug.handle, PlugOp::ReleaseIndefinite),
        _ => Ok(()),
    }
}

/// Waits until queue and device are empty. Returns how many packets are left.
fn wait_until_empty(conn: &mut Conn, ifb: On<'_>, patience: Duration) -> Result<u64, NetError> {
    let start = Instant::now();
    let mut pause = PAUSES.0;
    loop {
        let left = packets_inside(conn, ifb)?;
        if left == 0 || start.elapsed() >= patience {
            return Ok(left);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// In the queue, and between the device's entrance and its exit (the IFB driver hands packets to a tasklet).
/// A plug that was never opened, since nothing was ever redirected there, counts as empty.
fn packets_inside(conn: &mut Conn, ifb: On<'_>) -> Result<u64, NetError> {
    let queued = conn.root_qdisc(ifb)?.map_or(0, |q| q.packets);
    let inside = match conn.link(ifb.name)? {
        Some(Link { ifb_counts: (entered, dropped, left), .. }) => entered.saturating_sub(dropped).saturating_sub(left),
        None => 0,
    };
    Ok(queued + inside)
}
