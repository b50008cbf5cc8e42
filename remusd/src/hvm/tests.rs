//! A QEMU that only talks.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{DeviceModel, QmpError};
use crate::ids::DomId;
use crate::stream::libxl;
use crate::xen::{FakeStore, XenStore};

const DOM: DomId = DomId(5);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// One request and the descriptor that came with it.
fn request(stream: &UnixStream) -> Option<(Value, Option<RawFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut bytes = [0; 4096];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty()).ok()?;
    let fd = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let length = message.bytes;
    serde_json::from_slice(bytes.get(..length)?).ok().map(|request| (request, fd))
}

struct FakeQemu {
    _directory: tempfile::TempDir,
    path: PathBuf,
    thread: std::thread::JoinHandle<Vec<String>>,
}

/// Answers until the client leaves; yields the commands it was given. `silent_on` is never answered.
fn qemu(silent_on: &'static str) -> FakeQemu {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").unwrap();
        let mut commands = Vec::new();
        let mut file: Option<File> = None;
        while let Some((request, fd)) = request(&stream) {
            let command = request["execute"].as_str().unwrap().to_owned();
            commands.push(command.clone());
            if command == silent_on {
                continue;
            }
            let mut answer = json!({"return": {}});
            match command.as_str() {
                "add-fd" => {
                    // The number is in the fake's process, which is ours: a copy of the descriptor, owned here.
                    file = fd.map(adopt);
                    answer = json!({"return": {"fdset-id": 3, "fd": 17}});
                }
                "xen-save-devices-state" => {
                    assert_eq!(request["arguments"]["filename"], "/dev/fdset/3");
                    assert_eq!(request["arguments"]["live"], false);
                    let state = format!("state {}", commands.len());
                    file.as_mut().unwrap().write_all(state.as_bytes()).unwrap();
                }
                "cont" => answer = json!({"error": {"class": "GenericError", "desc": "not now"}}),
                _ => {}
            }
            // In pieces, and after an event, as QEMU may do.
            stream.write_all(b"{\"event\": \"STOP\"}\r\n{\"timest").unwrap();
            stream.write_all(b"amp\": 1, \"event\": \"RESUME\"}\r\n").unwrap();
            stream.write_all(format!("{answer}\r\n").as_bytes()).unwrap();
        }
        commands
    });
    FakeQemu { _directory: directory, path, thread }
}

fn adopt(fd: RawFd) -> File {
    // By its path in /proc, which needs no unsafe; the number itself stays open until the test ends.
    File::options().write(true).open(format!("/proc/self/fd/{fd}")).unwrap()
}

#[tokio::test]
async fn saves_and_keeps_in_step_after_a_refusal() {
    let qemu = qemu("");
    let mut model = DeviceModel::connect_to(DOM, &qemu.path, soon()).await.unwrap();
    model.log_dirty(true, soon()).await.unwrap();
    model.stop(soon()).await.unwrap();
    let record = model.save(soon()).await.unwrap();
    assert_eq!(record, libxl::emulator_context(b"state 5"));
    let refused = model.cont(soon()).await.unwrap_err();
    assert!(matches!(&refused, QmpError::Refused { cause, .. } if cause == "not now"));
    // A refusal leaves the connection in step.
    model.stop(soon()).await.unwrap();
    model.disconnect(soon()).await.unwrap();
    assert_eq!(
        qemu.thread.join().unwrap(),
        [
            "qmp_capabilities",
            "add-fd",
            "xen-set-global-dirty-log",
            "stop",
            "xen-save-devices-state",
            "cont",
            "stop",
            "remove-fd"
        ]
    );
}

#[tokio::test]
async fn a_silent_device_model_costs_no_more_than_the_deadline() {
    let qemu = qemu("stop");
    let mut model = DeviceModel::connect_to(DOM, &qemu.path, soon()).await.unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let error = model.stop(deadline).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    drop(model);
    qemu.thread.join().unwrap();
}

#[tokio::test]
async fn nobody_there_is_said_so() {
    let directory = tempfile::tempdir().unwrap();
    let outcome = DeviceModel::connect_to(DOM, &directory.path().join("none"), soon()).await;
    assert!(matches!(outcome.err(), Some(QmpError::Connect { .. })));
}

#[tokio::test]
async fn collects_the_keys() {
    let store = FakeStore::new();
    assert_eq!(DeviceModel::xenstore_record(&store, DOM, DomId(0)).await.unwrap(), None);
    let root = "/local/domain/0/device-model/5/physmap/f0000000";
    store.write(&format!("{root}/start_addr"), "f0000000").await.unwrap();
    store.write(&format!("{root}/size"), "800000").await.unwrap();
    let record = DeviceModel::xenstore_record(&store, DOM, DomId(0)).await.unwrap().unwrap();
    assert_eq!(record.kind, libxl::kind::EMULATOR_XENSTORE_DATA);
    libxl::check_emulator(record.kind, &record.body).unwrap();
    assert_eq!(&record.body[8..], b"physmap/f0000000/start_addr\0f0000000\0physmap/f0000000/size\x00800000\0");
}
