use std::os::unix::fs::PermissionsExt;

use super::*;

fn ring() -> (tempfile::TempDir, Arc<Keyring>) {
    let dir = tempfile::tempdir().unwrap();
    let ring = open(&dir).unwrap();
    (dir, ring)
}

const US: HostId = HostId(uuid::Uuid::from_u128(0xa));

fn open(dir: &tempfile::TempDir) -> Result<Arc<Keyring>, KeyringError> {
    Keyring::open(&dir.path().join("tls"), US)
}

fn stranger() -> (HostId, Certificate) {
    let id = HostId(uuid::Uuid::new_v4());
    (id, KeyPair::generate(id).unwrap().certificate)
}

#[test]
fn keys_and_peers_survive_a_restart() {
    let (dir, ring) = ring();
    assert_eq!(ring.identity(), None, "no keys before somebody pairs");
    let own = ring.own_identity().unwrap();
    let (id, certificate) = stranger();
    ring.pair(id, certificate.clone(), "hostb", "10.0.0.2", 7).unwrap();
    let again = open(&dir).unwrap();
    assert_eq!(again.identity(), Some(own));
    assert_eq!(again.whose(&certificate), Some(id));
    assert!(*again.any_peers().borrow());
    assert_eq!(again.find("10.0.0.2").map(|p| p.id), Some(id));
}

#[test]
fn exposed_or_foreign_files_are_not_used() {
    let (dir, ring) = ring();
    ring.own_identity().unwrap();
    let path = dir.path().join("tls/identity.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
    let error = open(&dir).unwrap_err();
    assert!(error.to_string().contains("version is 2"), "{error}");
    std::fs::write(&path, text).unwrap();
    let error = Keyring::open(&dir.path().join("tls"), HostId(uuid::Uuid::from_u128(0xb))).unwrap_err();
    assert!(error.to_string().contains("those of the host"), "{error}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = open(&dir).unwrap_err();
    assert!(error.to_string().contains("open to others"), "{error}");
}

#[test]
fn unpairing_ends_acceptance_and_the_listener() {
    let (_dir, ring) = ring();
    let (id, certificate) = stranger();
    ring.pair(id, certificate.clone(), "hostb", "hostb", 7).unwrap();
    assert!(matches!(ring.unpair("hostc"), Err(KeyringError::NotPaired(_))));
    ring.unpair("hostb").unwrap();
    assert_eq!(ring.whose(&certificate), None);
    assert!(!*ring.any_peers().borrow());
}

#[test]
fn nobody_is_paired_under_anothers_name_certificate_or_identity() {
    let (_dir, ring) = ring();
    let ((a, cert_a), (b, cert_b)) = (stranger(), stranger());
    ring.pair(a, cert_a.clone(), "hosta", "10.0.0.1", 7).unwrap();
    let told = |result: Result<(), KeyringError>| result.unwrap_err().to_string();
    assert!(told(ring.pair(b, cert_a.clone(), "hostb", "h", 7)).contains("does not name"));
    assert!(told(ring.pair(b, cert_b.clone(), "hosta", "h", 7)).contains("another host"));
    let own = ring.own_identity().unwrap();
    assert!(told(ring.pair(own.id, own.current.certificate, "me", "h", 7)).contains("own identity"));
    assert!(told(ring.pair(b, cert_b.clone(), "b;reboot", "h", 7)).contains("cannot be a host"));
    // The same host again, with a new key: only that one is accepted.
    let newer = KeyPair::generate(a).unwrap().certificate;
    ring.pair(a, newer.clone(), "hosta", "10.0.0.1", 7).unwrap();
    assert_eq!((ring.whose(&cert_a), ring.whose(&newer)), (None, Some(a)));
}

#[test]
fn a_peer_announces_only_its_own_certificate() {
    let (_dir, ring) = ring();
    let ((a, cert_a), (b, cert_b)) = (stranger(), stranger());
    ring.pair(a, cert_a.clone(), "a", "a", 7).unwrap();
    ring.pair(b, cert_b.clone(), "b", "b", 7).unwrap();
    assert!(ring.announced(a, &cert_a, cert_b.clone()).is_err());
    assert!(ring.announced(a, &cert_a, stranger().1).is_err());
    let next = KeyPair::generate(a).unwrap().certificate;
    ring.announced(a, &cert_a, next.clone()).unwrap();
    assert_eq!((ring.whose(&cert_a), ring.whose(&next)), (Some(a), Some(a)));
    ring.retired(a, &next).unwrap();
    assert_eq!((ring.whose(&cert_a), ring.whose(&next)), (None, Some(a)));
    assert_eq!(ring.whose(&cert_b), Some(b));
}

#[test]
fn a_rotation_that_was_interrupted_goes_on_with_the_same_key() {
    let (dir, ring) = ring();
    let before = ring.own_identity().unwrap().current;
    let next = ring.next_key().unwrap();
    let again = open(&dir).unwrap();
    assert_eq!(again.identity().unwrap().current, before);
    assert_eq!(again.next_key().unwrap(), next);
    again.switch().unwrap();
    again.switch().unwrap();
    let identity = open(&dir).unwrap().identity().unwrap();
    assert_eq!((identity.current, identity.next), (next, None));
}
