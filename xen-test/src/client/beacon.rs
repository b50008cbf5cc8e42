//! The sink of the guest's beacons.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use xen_test_guest::protocol::{BeaconSpec, Datagram, MAX_PAYLOAD};

use super::journal::Journal;

/// One beacon as it arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// When the client read it.
    pub at: Instant,
    /// Who sent it.
    pub from: SocketAddr,
    /// Its number.
    pub n: u64,
    /// The guest's time when it was sent.
    pub t_ns: u64,
}

/// What the beacons have shown so far.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BeaconReport {
    /// Beacons received.
    pub received: u64,
    /// Numbers never seen below the highest (UDP may lose some).
    pub lost: u64,
    /// Beacons with a number that was seen before: the guest went back in
    /// time behind something that had left it.
    pub repeated: u64,
    /// Beacons that came after one with a higher number.
    pub out_of_order: u64,
    /// Longest time without one, between two or since the last.
    pub longest_silence_ms: f64,
}

/// Receives on a thread of its own until dropped.
pub struct BeaconSink {
    socket: Arc<UdpSocket>,
    journal: Journal<Received>,
}

impl BeaconSink {
    /// Binds a free port of `address`, one of the client's own that the guest
    /// can reach.
    ///
    /// # Errors
    /// The address is not one of this machine's.
    pub fn bind(address: IpAddr) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind((address, 0))?);
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let journal = Journal::new();
        let (theirs, reader) = (journal.clone(), Arc::downgrade(&socket));
        thread::Builder::new().name("beacon-sink".into()).spawn(move || {
            let mut buffer = vec![0; MAX_PAYLOAD + 1];
            while let Some(socket) = reader.upgrade() {
                let Ok((got, from)) = socket.recv_from(&mut buffer) else { continue };
                let at = Instant::now();
                if let Ok(Datagram::Beacon { n, t_ns }) = String::from_utf8_lossy(&buffer[..got]).parse() {
                    theirs.push(Received { at, from, n, t_ns });
                }
            }
        })?;
        Ok(Self { socket, journal })
    }

    /// The order to give the guest, see [`super::Control::beacon`].
    ///
    /// # Errors
    /// The socket is broken.
    pub fn order(&self, hz: f64, payload: usize) -> io::Result<BeaconSpec> {
        Ok(BeaconSpec { to: self.socket.local_addr()?, hz, payload })
    }

    /// The beacons so far.
    pub fn received(&self) -> Vec<Received> {
        self.journal.read(<[Received]>::to_vec)
    }

    /// The first beacon that arrived after `when`, waiting up to `timeout`.
    pub fn first_after(&self, when: Instant, timeout: Duration) -> Option<Received> {
        self.journal.wait(Instant::now() + timeout, |all| {
            let first = all.partition_point(|r| r.at <= when);
            all.get(first).copied()
        })
    }

    /// Sums up all beacons so far.
    pub fn report(&self) -> BeaconReport {
        let all = self.received();
        let mut seen: Vec<u64> = all.iter().map(|r| r.n).collect();
        seen.sort_unstable();
        seen.dedup();
        let highest = seen.last().copied().unwrap_or(0);
        let silence = all
            .windows(2)
            .map(|w| w[1].at - w[0].at)
            .chain(all.last().map(|r| r.at.elapsed()))
            .max()
            .unwrap_or(Duration::ZERO);
        let mut before = 0;
        let mut out_of_order = 0;
        for r in &all {
            out_of_order += u64::from(r.n < before);
            before = before.max(r.n);
        }
        BeaconReport {
            received: all.len() as u64,
            lost: highest - seen.len() as u64,
            repeated: (all.len() - seen.len()) as u64,
            out_of_order,
            longest_silence_ms: silence.as_secs_f64() * 1000.0,
        }
    }
}
