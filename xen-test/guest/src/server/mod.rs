//! The guest's servers: a thread per connection, nothing shared but the
//! dirtier, the meters and the count of echo answers.

mod beacon;
mod control;
mod counter;
mod echo;
mod ledger;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use crate::load::dirty::Dirtier;
use crate::load::disk::DiskWriter;
use crate::load::ledger::Ledger;
use crate::load::stall::StallMeter;
use crate::load::work::Work;
use crate::protocol::{Mem, Ports};

/// The ways a guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Powers off.
    Poweroff,
    /// Reboots.
    Reboot,
    /// Panics.
    Crash,
}

/// What the servers of one guest share.
pub(crate) struct Guest {
    pub(crate) id: String,
    pub(crate) dirtier: Dirtier,
    pub(crate) disk: DiskWriter,
    pub(crate) ledger: Ledger,
    pub(crate) stalls: StallMeter,
    pub(crate) work: Work,
    pub(crate) beacons: beacon::Beacons,
    /// Echo answers made so far.
    pub(crate) answers: AtomicU64,
    pub(crate) end: Box<dyn Fn(End) + Send + Sync>,
}

/// The running servers. They run as long as the process does.
pub struct Servers {
    ports: Ports,
}

impl Servers {
    /// Binds and serves, on all addresses, IPv4 and IPv6 (only IPv4 where the
    /// kernel has no IPv6). `end` is called for `poweroff`, `reboot` and
    /// `crash`, after the answer has been written.
    ///
    /// # Errors
    /// A port is taken, or no thread could be made.
    pub fn start(ports: Ports, end: impl Fn(End) + Send + Sync + 'static) -> io::Result<Self> {
        let guest = Arc::new(Guest {
            id: instance_id(),
            dirtier: Dirtier::start()?,
            disk: DiskWriter::default(),
            ledger: Ledger::default(),
            stalls: StallMeter::default(),
            work: Work::default(),
            beacons: beacon::Beacons::default(),
            answers: AtomicU64::new(0),
            end: Box::new(end),
        });
        let udp = on_any_address(ports.echo_udp, UdpSocket::bind)?;
        let echo_udp = udp.local_addr()?.port();
        let theirs = Arc::clone(&guest);
        thread::Builder::new().name("echo-udp".into()).spawn(move || echo::udp(&udp, &theirs))?;
        Ok(Self {
            ports: Ports {
                counter: listen("counter", ports.counter, &guest, |s, _| counter::serve(&s))?,
                echo_tcp: listen("echo", ports.echo_tcp, &guest, |s, g| echo::tcp(&s, g))?,
                echo_udp,
                control: listen("control", ports.control, &guest, |s, g| control::serve(&s, g))?,
                ledger: listen("ledger", ports.ledger, &guest, |s, g| ledger::serve(&s, g))?,
            },
        })
    }

    /// The ports that were bound.
    pub fn ports(&self) -> Ports {
        self.ports
    }
}

fn on_any_address<T>(port: u16, bind: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    // An IPv6 socket also serves IPv4 (Linux's default for bindv6only).
    match bind((IpAddr::from(Ipv6Addr::UNSPECIFIED), port).into()) {
        Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) || e.kind() == io::ErrorKind::AddrNotAvailable => {
            bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), port).into())
        }
        other => other,
    }
}

fn listen(
    name: &'static str,
    port: u16,
    guest: &Arc<Guest>,
    serve: impl Fn(TcpStream, &Guest) -> io::Result<()> + Copy + Send + 'static,
) -> io::Result<u16> {
    let listener = on_any_address(port, TcpListener::bind)?;
    let port = listener.local_addr()?.port();
    let guest = Arc::clone(guest);
    thread::Builder::new().name(name.into()).spawn(move || {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of descriptors or memory: give others time to end.
                    eprintln!("guest: {name}: accept: {e}");
                    thread::sleep(Duration::from_millis(200));
                    continue;
                }
            };
            let guest = Arc::clone(&guest);
            let run = move || {
                // A client that went away is no news; the client side tells.
                let _ = stream.set_nodelay(true).and_then(|()| serve(stream, &guest));
            };
            if let Err(e) = thread::Builder::new().name(name.into()).spawn(run) {
                eprintln!("guest: {name}: {e}");
            }
        }
    })?;
    Ok(port)
}

/// Random for each start of the servers.
fn instance_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|id| id.trim().to_owned())
        // Without /proc the TSC still tells two starts apart.
        .unwrap_or_else(|_| format!("tsc-{:016x}", crate::sys::rdtsc()))
}

/// What /proc/meminfo says, zeroes where it is silent.
pub(crate) fn mem_kb() -> Mem {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':')?.split_ascii_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    Mem { total_kb: field("MemTotal"), free_kb: field("MemFree"), available_kb: field("MemAvailable") }
}
