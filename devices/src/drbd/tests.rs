//! The probe script in every state that it tells apart.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::probe::ProbeError;
use super::*;
use crate::device::EpochContext;

/// The real script, in a world of its own: what it reads of the kernel, and the tools that it finds.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// `proc` is `/proc/drbd`, `drbdsetup` a shell program.
    fn new(proc: Option<&str>, drbdsetup: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if let Some(text) = proc {
            std::fs::write(dir.path().join("drbd"), text).unwrap();
        }
        // The probe and nothing but what it needs: no tool of this machine is found by accident.
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/block-drbd-probe");
        let wrapper = format!(
            "#!/bin/sh\nexport REMUS_PROC={0} REMUS_DRBD_NUMBERS=\"${{NUMBERS-147:0}}\" PATH={0}/bin:/usr/bin:/bin\n\
             exec /bin/sh {script} \"$@\"\n",
            dir.path().display()
        );
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        write_program(&dir.path().join("probe"), &wrapper);
        if let Some(body) = drbdsetup {
            write_program(&dir.path().join("bin/drbdsetup"), &format!("#!/bin/sh\n{body}\n"));
        }
        Self { dir }
    }

    async fn probe(&self) -> Result<Finding, ProbeError> {
        probe(&self.dir.path().join("probe"), Path::new("/dev/null"), Duration::from_secs(20)).await
    }
}

fn write_program(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(new, path).unwrap();
}

const HEAD: &str = "version: 8.4.11 (api:1/proto:86-101)\nsrcversion: 0\n";

fn line(state: &str) -> String {
    format!(
        "{HEAD} 0: {state} r-----\n    ns:0 nr:0\n 1: cs:Connected ro:Primary/Primary ds:UpToDate/UpToDate D r-----\n"
    )
}

#[tokio::test]
async fn a_protocol_d_pair_is_recognised_and_refused_when_it_is_set_up() {
    let world = World::new(Some(&line("cs:Connected ro:Primary/Primary ds:UpToDate/UpToDate D")), None);
    assert_eq!(world.probe().await.unwrap(), Finding::ProtocolD);
    let params = [("params".to_owned(), "/dev/null".to_owned())].into();
    let device = Device { kind: Kind::Disk, domid: 3, devid: 51712, names: vec!["xvda".into()], params };
    let drbd = Drbd::new(world.dir.path().join("probe"));
    assert_eq!(drbd.matches(&device).await.unwrap(), Match::Yes);
    let mut refused = drbd.attach(&device);
    let error = refused.setup().await.unwrap_err().to_string();
    assert!(error.contains("protocol D") && error.contains("mirrored disk"), "{error}");
    refused.teardown(Ending::Release).await.unwrap();
}

/// Perl's `ioctl`, replaced: it notes what it is asked, and answers what the file `answers` says next: a number, `EIO`, or `hang`.
const STAND_IN: &str = r#"
package StandIn;
use Errno qw(EIO);
BEGIN {
    my $dir = $ENV{STAND_IN};
    open(my $file, '<', "$dir/answers") or die; my @answers = <$file>; chomp @answers;
    *CORE::GLOBAL::ioctl = sub (*$$) {
        my (undef, $number, $argument) = @_;
        open(my $log, '>>', "$dir/asked") or die; print $log "$number $argument\n"; close $log;
        my $answer = shift @answers;
        if ($answer eq 'hang') { sleep 600; }
        if ($answer eq 'EIO') { $! = EIO; return undef; }
        return $answer == 0 ? "0 but true" : $answer;
    };
}
1;
"#;

/// A disk with protocol D whose ioctls are the stand-in's.
struct StandIn {
    world: World,
    disk: Box<dyn Checkpointed>,
}

impl StandIn {
    async fn new(answers: &str, limit: Duration) -> Self {
        let world = World::new(Some(&line("cs:Connected ro:Primary/Primary ds:UpToDate/UpToDate D")), None);
        let dir = world.dir.path().to_owned();
        std::fs::write(dir.join("StandIn.pm"), STAND_IN).unwrap();
        std::fs::write(dir.join("answers"), answers.replace(' ', "\n")).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/drbd-checkpoint");
        let wrapper =
            format!("#!/bin/sh\nexport STAND_IN={0} PERL5LIB={0}\nexec perl -MStandIn {script}\n", dir.display());
        write_program(&dir.join("program"), &wrapper);
        let params = [("params".to_owned(), "/dev/null".to_owned())].into();
        let device = Device { kind: Kind::Disk, domid: 3, devid: 51712, names: vec!["xvda".into()], params };
        let limits = DrbdLimits { paused: limit, running: limit };
        let drbd = Drbd::new(dir.join("probe")).with_checkpoints(dir.join("program"), limits);
        assert_eq!(drbd.matches(&device).await.unwrap(), Match::Yes);
        let mut disk = drbd.attach(&device);
        disk.setup().await.unwrap();
        Self { world, disk }
    }

    fn asked(&self) -> String {
        std::fs::read_to_string(self.world.dir.path().join("asked")).unwrap_or_default().trim().replace('\n', ", ")
    }
}

const LONG: Duration = Duration::from_secs(60);

fn epoch(epoch: u64) -> EpochContext {
    EpochContext { epoch, armed: true }
}

#[tokio::test]
async fn a_checkpoint_is_sent_in_the_pause_and_waited_for_outside_of_it() {
    let mut it = StandIn::new("0 0 1 0 0", LONG).await;
    assert!(it.disk.is_ready().await);
    it.disk.postsuspend(&epoch(1)).await.unwrap();
    assert_eq!(it.asked(), "20 0", "the guest stands still: nothing is waited for");
    it.disk.preresume(&epoch(1)).await.unwrap();
    assert_eq!(it.asked(), "20 0");
    it.disk.confirm(&epoch(1)).await.unwrap();
    it.disk.commit(&epoch(1)).await.unwrap();
    assert_eq!(it.asked(), "20 0, 30 0");
    // An epoch without writes has nothing to wait for.
    it.disk.postsuspend(&epoch(2)).await.unwrap();
    it.disk.confirm(&epoch(2)).await.unwrap();
    assert_eq!(it.asked(), "20 0, 30 0, 20 0");
    it.disk.postsuspend(&epoch(3)).await.unwrap();
    it.disk.confirm(&epoch(3)).await.unwrap();
    assert_eq!(it.asked(), "20 0, 30 0, 20 0, 20 0, 30 0");
    it.disk.teardown(Ending::Release).await.unwrap();
    it.disk.teardown(Ending::Release).await.unwrap();
}

#[tokio::test]
async fn no_error_of_a_checkpoint_is_ignored_and_the_disk_refuses_further_epochs() {
    for (answers, word) in [("EIO", "Input/output error"), ("7", "answered 7")] {
        let mut it = StandIn::new(answers, LONG).await;
        let error = it.disk.postsuspend(&epoch(1)).await.unwrap_err().to_string();
        assert!(error.contains("SEND_CHECKPOINT") && error.contains(word), "{error}");
        assert!(it.disk.postsuspend(&epoch(2)).await.is_err());
    }
    for (answers, word) in [("0 EIO", "Input/output error"), ("0 1", "answered 1")] {
        let mut it = StandIn::new(answers, LONG).await;
        it.disk.postsuspend(&epoch(1)).await.unwrap();
        let error = it.disk.confirm(&epoch(1)).await.unwrap_err().to_string();
        assert!(error.contains("WAIT_CHECKPOINT_ACK") && error.contains(word), "{error}");
        assert!(it.disk.postsuspend(&epoch(2)).await.is_err());
    }
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_an_error_and_so_is_an_epoch_that_it_has_and_nobody_will_ever_acknowledge() {
    let mut it = StandIn::new("0 hang", Duration::from_secs(2)).await;
    it.disk.postsuspend(&epoch(1)).await.unwrap();
    let error = it.disk.confirm(&epoch(1)).await.unwrap_err().to_string();
    assert!(error.contains("within"), "{error}");

    let mut it = StandIn::new("1 0", LONG).await;
    it.disk.postsuspend(&epoch(1)).await.unwrap();
    it.disk.abandon(&epoch(1)).await.unwrap();
    it.disk.postsuspend(&epoch(2)).await.unwrap();
    let error = it.disk.abandon(&epoch(2)).await.unwrap_err().to_string();
    assert!(error.contains("protect the guest anew"), "{error}");
    assert!(it.disk.postsuspend(&epoch(3)).await.is_err());
}

#[tokio::test]
async fn ordinary_drbd_is_refused_and_the_mirror_named() {
    for protocol in ["A", "B", "C"] {
        let state = format!("cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate {protocol}");
        let error = World::new(Some(&line(&state)), None).probe().await.unwrap_err();
        assert!(matches!(error, ProbeError::Protocol(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("protocol {protocol}")) && text.contains("mirrored"), "{text}");
    }
}

#[tokio::test]
async fn a_pair_that_is_not_connected_or_in_other_roles_is_not_ready() {
    for (state, word) in [
        ("cs:WFConnection ro:Primary/Unknown ds:UpToDate/DUnknown D", "WFConnection"),
        ("cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate D", "Primary/Secondary"),
        ("cs:Connected ro:Primary/Primary ds:UpToDate/Inconsistent D", "Inconsistent"),
        ("cs:Unconfigured", "Unconfigured"),
    ] {
        let error = World::new(Some(&line(state)), None).probe().await.unwrap_err();
        assert!(matches!(error, ProbeError::NotReady(_)) && error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn drbd_9_is_asked_by_its_tool() {
    let nine = "version: 9.2.8 (api:2/proto:86-122)\n";
    let error = World::new(Some(nine), None).probe().await.unwrap_err();
    assert!(matches!(error, ProbeError::Unknown(_)) && error.to_string().contains("drbdsetup"), "{error}");
    let tool = "case $1 in events2) echo 'exists device name:r0 volume:0 minor:0 disk:UpToDate';; \
                show) echo 'resource \"r0\" {'; echo '    net {'; echo '        protocol C; # default'; echo '}';; esac";
    let error = World::new(Some(nine), Some(tool)).probe().await.unwrap_err();
    assert!(matches!(error, ProbeError::Protocol(_)) && error.to_string().contains("protocol C"), "{error}");
    let error = World::new(Some(nine), Some("echo no such thing >&2; exit 10")).probe().await.unwrap_err();
    assert!(matches!(error, ProbeError::Unknown(_)) && error.to_string().contains("no such thing"), "{error}");
}

#[tokio::test]
async fn other_disks_are_not_drbd_and_doubt_is_an_error() {
    let world = World::new(Some(&line("cs:Connected ro:Primary/Primary ds:UpToDate/UpToDate D")), None);
    let wrapper = std::fs::read_to_string(world.dir.path().join("probe")).unwrap();
    write_program(&world.dir.path().join("probe"), &wrapper.replace("147:0", "253:0"));
    assert_eq!(world.probe().await.unwrap(), Finding::NotDrbd);
    // The device has DRBD's number, and the module is not there.
    let error = World::new(None, None).probe().await.unwrap_err();
    assert!(matches!(error, ProbeError::Unknown(_)), "{error}");
    // Not a block device at all, without the stand-in for its numbers.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/block-drbd-probe");
    let missing =
        probe(Path::new(script), Path::new("/dev/no-such-device"), Duration::from_secs(20)).await.unwrap_err();
    assert!(matches!(missing, ProbeError::Unknown(_)), "{missing}");
    let dir = tempfile::tempdir().unwrap();
    write_program(&dir.path().join("odd"), "#!/bin/sh\nexit 77\n");
    let odd = probe(&dir.path().join("odd"), Path::new("/dev/null"), Duration::from_secs(20)).await.unwrap_err();
    assert!(matches!(odd, ProbeError::Strange { .. }), "{odd}");
    assert!(matches!(
        probe(Path::new("/no/probe"), Path::new("/dev/null"), Duration::from_secs(20)).await,
        Err(ProbeError::Run { .. })
    ));
}
