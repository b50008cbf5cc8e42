//! Beacons: numbered datagrams that nobody asked for one by one.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock::monotonic_ns;
use crate::protocol::{BeaconInfo, BeaconSpec, Datagram};

/// The running beacons, one for each destination.
#[derive(Default)]
pub(crate) struct Beacons {
    /// Dropping the sender ends the thread.
    running: Mutex<HashMap<SocketAddr, Sender<()>>>,
}

impl Beacons {
    /// Starts the beacon to a destination, anew if there is one; rate 0 ends it.
    pub(crate) fn order(&self, spec: BeaconSpec) -> io::Result<BeaconInfo> {
        let mut running = self.lock();
        running.remove(&spec.to);
        if spec.hz > 0.0 {
            let any: IpAddr = match spec.to {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0))?;
            let (alive, ended) = mpsc::channel::<()>();
            thread::Builder::new().name("beacon".into()).spawn(move || {
                let step = Duration::from_secs_f64(1.0 / spec.hz);
                let mut due = Instant::now();
                let mut n = 0;
                while let Err(RecvTimeoutError::Timeout) =
                    ended.recv_timeout(due.saturating_duration_since(Instant::now()))
                {
                    n += 1;
                    let text = Datagram::Beacon { n, t_ns: monotonic_ns() }.padded(spec.payload);
                    // Nobody listening, or no route yet: the next one may do.
                    let _ = socket.send_to(text.as_bytes(), spec.to);
                    due = (due + step).max(Instant::now());
                }
            })?;
            running.insert(spec.to, alive);
        }
        Ok(BeaconInfo { running: running.len() })
    }

    /// Ends all.
    pub(crate) fn stop(&self) -> BeaconInfo {
        self.lock().clear();
        BeaconInfo { running: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Sender<()>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
