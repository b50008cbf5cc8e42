//! Typed calls of the guest's control port.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use xen_test_guest::protocol::{
    BeaconInfo, BeaconSpec, Command, DirtyInfo, DirtySpec, DiskInfo, DiskSpec, Hello, LedgerInfo, Mem, Reply,
    StallReport, Verdict, WorkInfo,
};

/// A control call that failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The guest could not be asked, or did not answer in time.
    #[error("guest {guest}: {command}: {source}")]
    Io {
        /// Its control port.
        guest: SocketAddr,
        /// What was asked.
        command: Command,
        /// Why.
        source: io::Error,
    },
    /// The guest refused.
    #[error("guest {guest}: {command}: {reason}")]
    Refused {
        /// Its control port.
        guest: SocketAddr,
        /// What was asked.
        command: Command,
        /// Its words.
        reason: String,
    },
}

/// The control port of one guest. Every call is a connection of its own, so
/// that a call that never came back harms no later one.
#[derive(Debug, Clone, Copy)]
pub struct Control {
    guest: SocketAddr,
    timeout: Duration,
}

impl Control {
    /// `timeout` bounds connecting, and then each wait for an answer.
    pub fn new(guest: SocketAddr, timeout: Duration) -> Self {
        Self { guest, timeout }
    }

    /// Asks `hello` again and again until the guest answers.
    ///
    /// # Errors
    /// The last failure, when `within` is over.
    pub fn wait_ready(&self, within: Duration) -> Result<Hello, ControlError> {
        let deadline = Instant::now() + within;
        // Short tries at first: a SYN that the booting guest missed is repeated by the kernel only after 1, 3, 7... seconds. Longer
        // ones later: of a protected guest each packet waits for its epoch.
        let mut limit = Duration::from_secs(1);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match Self::new(self.guest, limit.min(left).max(Duration::from_millis(10))).hello() {
                Ok(hello) => return Ok(hello),
                Err(e) if left.is_zero() => return Err(e),
                // Refused at once: nobody tells us when that changes.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
            limit = (limit * 5 / 4).min(Duration::from_secs(30));
        }
    }

    /// Who the guest is.
    ///
    /// # Errors
    /// As all calls: [`ControlError`].
    pub fn hello(&self) -> Result<Hello, ControlError> {
        self.call(Command::Hello)
    }

    /// Its memory.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn mem(&self) -> Result<Mem, ControlError> {
        self.call(Command::Mem)
    }

    /// Starts or changes the dirtier; blocks while the guest fills the region.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn dirty(&self, spec: DirtySpec) -> Result<DirtyInfo, ControlError> {
        self.call(Command::Dirty(spec))
    }

    /// What the dirtier does.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn dirty_info(&self) -> Result<DirtyInfo, ControlError> {
        self.call(Command::DirtyInfo)
    }

    /// Checks the dirtier's memory.
    ///
    /// # Errors
    /// [`ControlError`]; bad pages are no error but in the verdict.
    pub fn verify(&self) -> Result<Verdict, ControlError> {
        self.call(Command::Verify)
    }

    /// Starts the disk writer, or changes its rate; blocks while the guest clears the device.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn disk_start(&self, spec: DiskSpec) -> Result<DiskInfo, ControlError> {
        self.call(Command::DiskStart(spec))
    }

    /// How far the disk writer is.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn disk_read(&self) -> Result<DiskInfo, ControlError> {
        self.call(Command::DiskRead)
    }

    /// Reads all records of the disk writer back.
    ///
    /// # Errors
    /// [`ControlError`]; what is wrong with the disk is no error but in the answer.
    pub fn disk_verify(&self) -> Result<DiskInfo, ControlError> {
        self.call(Command::DiskVerify)
    }

    /// Opens the ledger on the ext4 of a block device.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn ledger_open(&self, device: &str) -> Result<LedgerInfo, ControlError> {
        self.call(Command::LedgerOpen { device: device.to_owned() })
    }

    /// Reads the ledger from the disk, past all caches.
    ///
    /// # Errors
    /// [`ControlError`]; what is wrong with it is no error but in the answer.
    pub fn ledger_check(&self) -> Result<LedgerInfo, ControlError> {
        self.call(Command::LedgerCheck)
    }

    /// Closes the ledger and unmounts its file system.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn ledger_close(&self) -> Result<LedgerInfo, ControlError> {
        self.call(Command::LedgerClose)
    }

    /// Starts the stall meter.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn stall_start(&self, threshold_ms: f64) -> Result<StallReport, ControlError> {
        self.call(Command::StallStart { threshold_ms })
    }

    /// What the stall meter saw.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn stall_read(&self, reset: bool) -> Result<StallReport, ControlError> {
        self.call(Command::StallRead { reset })
    }

    /// Stops the stall meter.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn stall_stop(&self) -> Result<StallReport, ControlError> {
        self.call(Command::StallStop)
    }

    /// Starts counting busy work.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn work_start(&self) -> Result<WorkInfo, ControlError> {
        self.call(Command::WorkStart)
    }

    /// Work done so far.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn work_read(&self) -> Result<WorkInfo, ControlError> {
        self.call(Command::WorkRead)
    }

    /// Stops the work.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn work_stop(&self) -> Result<WorkInfo, ControlError> {
        self.call(Command::WorkStop)
    }

    /// Starts, changes or (rate 0) ends a beacon.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn beacon(&self, spec: BeaconSpec) -> Result<BeaconInfo, ControlError> {
        self.call(Command::Beacon(spec))
    }

    /// Ends all beacons.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn beacon_stop(&self) -> Result<BeaconInfo, ControlError> {
        self.call(Command::BeaconStop)
    }

    /// Powers the guest off; its answer comes first, the end soon after.
    /// With output held by a protection, the answer may never come.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn poweroff(&self) -> Result<Hello, ControlError> {
        self.call(Command::Poweroff)
    }

    /// Reboots the guest; see [`Control::poweroff`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn reboot(&self) -> Result<Hello, ControlError> {
        self.call(Command::Reboot)
    }

    /// Panics the guest's kernel; see [`Control::poweroff`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn crash(&self) -> Result<Hello, ControlError> {
        self.call(Command::Crash)
    }

    fn call<T: DeserializeOwned>(&self, command: Command) -> Result<T, ControlError> {
        match self.exchange(&command) {
            Ok(Reply::Ok(it)) => Ok(it),
            Ok(Reply::Error(reason)) => Err(ControlError::Refused { guest: self.guest, command, reason }),
            Err(source) => Err(ControlError::Io { guest: self.guest, command, source }),
        }
    }

    fn exchange<T: DeserializeOwned>(&self, command: &Command) -> io::Result<Reply<T>> {
        let mut stream = TcpStream::connect_timeout(&self.guest, self.timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        match BufReader::new(stream).read_line(&mut line) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the guest closed the connection")),
            // How a read timeout shows; its own words would puzzle anybody.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let text = format!("connected, but no answer within {:?}", self.timeout);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(e) => return Err(e),
            Ok(_) => {}
        }
        Ok(serde_json::from_str(&line)?)
    }
}
