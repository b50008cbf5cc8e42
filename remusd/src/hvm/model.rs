//! What a checkpoint needs of the device model: stop, save, go on; and log-dirty for what it writes to guest memory itself.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError, socket_path};
use crate::ids::DomId;
use crate::stream::{Record, libxl};
use crate::xen::{StoreError, XenStore};

/// The device model of one domain. Keeps one connection for its whole life: QEMU serves one client at a time, so connect shortly
/// before use and drop it when protection ends; libxl (`xl` commands on this domain) waits meanwhile.
pub struct DeviceModel {
    domid: DomId,
    qmp: Qmp,
    /// Where QEMU writes its state: memory, not a file system that may be slow. The second handle is the one that QEMU has.
    state: File,
    writer: File,
    fdset: u64,
}

impl DeviceModel {
    /// Connects to the device model and gives it the descriptor to save to.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn connect(domid: DomId, deadline: Instant) -> Result<Self, QmpError> {
        Self::connect_to(domid, &socket_path(domid), deadline).await
    }

    /// As [`connect`](Self::connect), to a socket anywhere.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn connect_to(domid: DomId, path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let local = |cause: String| QmpError::Local { domid, cause };
        let state: File = memfd_create("remus-device-model", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| local(format!("no memory file: {errno}")))?
            .into();
        // QEMU opens /dev/fdset for writing only, and takes only a descriptor with exactly that mode.
        let writer = File::options()
            .write(true)
            .open(format!("/proc/self/fd/{}", state.as_raw_fd()))
            .map_err(|error| local(format!("no second handle of the memory file: {error}")))?;
        let mut qmp = Qmp::connect(domid, path, deadline).await?;
        let added = qmp.execute_with_fd("add-fd", &json!({}), writer.as_fd(), deadline).await?;
        let Some(fdset) = added.get("fdset-id").and_then(Value::as_u64) else {
            return Err(QmpError::Refused { domid, command: "add-fd".into(), cause: added.to_string() });
        };
        Ok(Self { domid, qmp, state, writer, fdset })
    }

    /// Stops the device model; pending disk requests are completed first. The guest must be suspended.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn stop(&mut self, deadline: Instant) -> Result<(), QmpError> {
        self.run("stop", json!({}), deadline).await
    }

    /// Lets the stopped device model go on. Do it before the guest is resumed.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn cont(&mut self, deadline: Instant) -> Result<(), QmpError> {
        self.run("cont", json!({}), deadline).await
    }

    /// Has the device model log what it writes to guest memory (or no more): the answer to the helper's
    /// [`SwitchQemuLogdirty`](crate::capture::EngineCall::SwitchQemuLogdirty).
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn log_dirty(&mut self, enable: bool, deadline: Instant) -> Result<(), QmpError> {
        let arguments = json!({ "enable": enable });
        self.run("xen-set-global-dirty-log", arguments, deadline).await
    }

    /// The stopped device model's state, as the record that libxl would send.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn save(&mut self, deadline: Instant) -> Result<Record, QmpError> {
        self.rewind()?;
        // live=false: with true QEMU, being stopped, would also give up its disks (migration/savevm.c).
        let arguments = json!({ "filename": format!("/dev/fdset/{}", self.fdset), "live": false });
        self.run("xen-save-devices-state", arguments, deadline).await?;
        let mut state = Vec::new();
        let read = (|| {
            self.state.seek(SeekFrom::Start(0))?;
            self.state.read_to_end(&mut state)
        })();
        read.map_err(|error| self.local(&error))?;
        if state.is_empty() {
            return Err(QmpError::Local { domid: self.domid, cause: "QEMU wrote nothing".into() });
        }
        Ok(libxl::emulator_context(&state))
    }

    /// Gives the descriptor back. Without it the device model keeps it open, which does no harm.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn disconnect(mut self, deadline: Instant) -> Result<(), QmpError> {
        let arguments = json!({ "fdset-id": self.fdset });
        self.run("remove-fd", arguments, deadline).await
    }

    async fn run(&mut self, command: &str, arguments: Value, deadline: Instant) -> Result<(), QmpError> {
        let answer = self.qmp.execute(command, &arguments, deadline).await;
        answer.map(drop)
    }

    /// QEMU's descriptor is the same open file as ours, so it writes from where we put it.
    fn rewind(&mut self) -> Result<(), QmpError> {
        let rewound = self.writer.set_len(0).and_then(|()| self.writer.rewind());
        rewound.map_err(|error| self.local(&error))
    }

    fn local(&self, error: &std::io::Error) -> QmpError {
        QmpError::Local { domid: self.domid, cause: error.to_string() }
    }

    /// The device model's keys in xenstore, as the record that libxl would send before the state; `None` without keys, as with
    /// every recent QEMU. `device_model_domid` is 0 unless it runs in a stub domain.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn xenstore_record(
        store: &dyn XenStore,
        domid: DomId,
        device_model_domid: DomId,
    ) -> Result<Option<Record>, StoreError> {
        let root = format!("/local/domain/{device_model_domid}/device-model/{domid}");
        let mut pairs = Vec::new();
        for address in store.directory(&format!("{root}/physmap")).await? {
            for name in ["start_addr", "size", "name"] {
                let key = format!("physmap/{address}/{name}");
                if let Some(value) = store.read(&format!("{root}/{key}")).await? {
                    pairs.push((key, value));
                }
            }
        }
        Ok(libxl::emulator_xenstore(&pairs))
    }
}
