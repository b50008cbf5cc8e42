//! What systemd is told (sd_notify(3)): that the daemon is ready, reads its files anew, ends, and that it is alive.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use super::Daemon;

/// The way to the service manager.
#[derive(Clone, Debug, Default)]
pub struct Notify {
    address: Option<SocketAddr>,
    /// How often it wants to hear that we are alive: half of what it would wait.
    beat: Option<Duration>,
}

impl Notify {
    /// As the environment says; one that tells nobody without a service manager.
    #[must_use]
    pub fn of_environment() -> Self {
        let address = std::env::var("NOTIFY_SOCKET").ok().and_then(|path| address(&path));
        let ours = std::env::var("WATCHDOG_PID").ok().is_none_or(|pid| pid.parse() == Ok(std::process::id()));
        let micros = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse::<u64>().ok());
        Self {
            address,
            beat: micros.filter(|micros| ours && *micros > 1).map(|micros| Duration::from_micros(micros / 2)),
        }
    }

    /// Sends a message. That nobody takes it changes nothing.
    pub fn say(&self, message: &str) {
        let Some(address) = &self.address else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.send_to_addr(message.as_bytes(), address)
        });
        if let Err(error) = sent {
            tracing::debug!("the service manager was not told {message:?}: {error}");
        }
    }

    /// All is recovered, requests are taken.
    pub fn ready(&self) {
        self.say("READY=1");
    }

    /// The files are being read anew. [`Self::ready`] ends that.
    pub fn reloading(&self) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let micros = now.map_or(0, |now| now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000);
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The daemon ends.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    /// Says that the daemon is alive for as long as it can say how its protections stand, for ever. Suspended guests do not depend on
    /// this: the suspend guard resumes them whoever hangs.
    pub async fn beat(self, daemon: Arc<Daemon>) {
        let Some(beat) = self.beat else { return };
        let mut interval = tokio::time::interval(beat);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            match tokio::time::timeout(beat, daemon.rows(None)).await {
                Ok(_) => self.say("WATCHDOG=1"),
                Err(_) => tracing::error!("the daemon does not answer itself; the service manager will start it anew"),
            }
        }
    }
}

fn address(path: &str) -> Option<SocketAddr> {
    match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name).ok(),
        None => SocketAddr::from_pathname(path).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_hears_it_by_path_and_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("remusd-test-{}", uuid::Uuid::new_v4());
        let heard = [
            (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned()),
            (UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(), format!("@{name}")),
        ];
        for (socket, typed) in heard {
            let notify = Notify { address: address(&typed), beat: None };
            notify.ready();
            notify.reloading();
            let mut buffer = [0; 128];
            let size = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..size], b"READY=1");
            let size = socket.recv(&mut buffer).unwrap();
            let text = std::str::from_utf8(&buffer[..size]).unwrap();
            let micros = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
            assert!(micros.parse::<u64>().unwrap() > 0);
        }
        Notify::default().ready();
    }
}
